// Joins what is recorded into few large regions.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "memory/layout.h"

namespace kvf {

// Joins fragments as they are added: neighbours in memory and in the buffer become one run, and
// runs of one width at one pitch become one region. Half a million fragments of a cache become a
// few dozen regions where its sequences were decoded in turn. Where they were decoded in a random
// order, the runs of one tensor become the table for all tensors.
class LayoutBuilder {
public:
    // One run of `bytes` at `address`, whose place in the buffer is `offset`.
    void add(uint64_t address, uint64_t offset, uint64_t bytes) {
        if (bytes == 0) return; // recurrent states may have rows of nothing
        ++fragments_;
        layout_.bytes += bytes;
        if (address == run_.address + run_.bytes && offset == run_.offset + run_.bytes &&
            run_.bytes) {
            run_.bytes += bytes;
            return;
        }
        keep_run();
        run_ = {address, offset, bytes};
    }

    void add(const kvf_region &region);

    // What is added next lies in another allocation, and is joined to nothing that was added
    // before.
    void begin_allocation() {
        keep_run();
        run_ = {};
        keep_region();
    }

    // What is added next lies in another tensor, which may be fragmented as the last one was.
    void begin_tensor();

    uint64_t fragments() const { return fragments_; }

    // After begin_tensor(): the bytes of what take() would return.
    uint64_t bytes() const { return layout_.bytes; }
    // Returns what was added before the last begin_tensor(). What is added later is recorded as if
    // nothing had been taken.
    Layout take();

    Layout finish();

private:
    void keep_run() {
        if (region_.rows > 1 && run_.bytes == region_.width &&
            run_.address == region_.address + region_.rows * region_.pitch &&
            run_.offset == region_.offset + region_.rows * region_.buffer_pitch) {
            ++region_.rows;
        } else if (run_.bytes) {
            start_region();
        }
    }
    void start_region();
    void keep_region();
    void keep_rows(uint64_t rows);
    void keep_irregular(const Run &run);
    void stop_matching();

    Layout layout_;
    uint64_t fragments_ = 0;

    // A fragment passes through three stages. Each keeps what may still grow.
    Run run_{};           // neighbours; bytes == 0: none
    kvf_region region_{}; // rows; rows == 0: none
    // The irregular rest of the tensor: equal to a former tensor's so far, or else a table of its
    // own.
    std::shared_ptr<const RunTable> pattern_;             // of a former tensor; NULL: none
    uint64_t matched_ = 0;                                // of its runs
    bool matching_ = false;                               // else the tensor's runs are in own_
    uint64_t address_distance_ = 0, offset_distance_ = 0; // from the pattern's
    std::vector<Run> own_;
};

} // namespace kvf
