// What a transfer consists of: regions, joined while they are recorded into few large ones, and handed
// out again in pieces of the size that a device wants.
#pragma once

#include <cstdint>
#include <vector>

#include "status.h"

namespace kvf {

enum class Direction : uint32_t { Save = 0, Load = 1 };

// A fragment that joined no other: one of the irregular rest. Always smaller than kLongRun.
struct Run {
    uint64_t address;
    uint64_t offset; // in the buffer
    uint64_t bytes;
};

// A run of this many bytes is worth a copy of its own.
constexpr uint64_t kLongRun = 64 << 10;
// Fewer rows than this are not worth a two-dimensional copy of their own.
constexpr uint64_t kFewRows = 8;

// Regions of one device, in the order in which they were recorded.
struct Layout {
    std::vector<kvf_region> blocks; // long runs (rows == 1) and two-dimensional blocks
    std::vector<Run> runs;          // the irregular rest
    uint64_t bytes = 0;

    bool empty() const { return blocks.empty() && runs.empty(); }
    uint64_t segments() const { return blocks.size() + runs.size(); }
};

// Joins fragments as they come: neighbours in memory and in the buffer become one run, and rows of one
// width at one pitch become one block. Half a million fragments of a cache whose sequences were
// decoded in turn become a few dozen blocks.
class LayoutBuilder {
public:
    // One run of `bytes` at `address`, whose place in the buffer is `offset`.
    void add(uint64_t address, uint64_t offset, uint64_t bytes) {
        if (bytes == 0) return; // recurrent states may have rows of nothing
        ++fragments_;
        layout_.bytes += bytes;
        if (block_.rows == 1) {
            if (address == block_.address + block_.width &&
                offset == block_.offset + block_.width) {
                block_.width += bytes;
                return;
            }
            if (bytes == block_.width && address >= block_.address + bytes &&
                offset >= block_.offset + bytes) {
                block_.pitch = address - block_.address;
                block_.buffer_pitch = offset - block_.offset;
                block_.rows = 2;
                return;
            }
        } else if (bytes == block_.width &&
                   address == block_.address + block_.rows * block_.pitch &&
                   offset == block_.offset + block_.rows * block_.buffer_pitch) {
            ++block_.rows;
            return;
        }
        start_anew(address, offset, bytes);
    }

    void add(const kvf_region &region);

    uint64_t fragments() const { return fragments_; }
    Layout finish();

private:
    void start_anew(uint64_t address, uint64_t offset, uint64_t bytes);
    void keep_block();
    void keep_rows(uint64_t rows);

    Layout layout_;
    kvf_region block_{}; // being grown; rows == 0: none
    uint64_t fragments_ = 0;
};

// A part of a layout: one block, or a stretch of the irregular rest.
struct Piece {
    kvf_region block{};
    const Run *runs = nullptr; // not NULL: `count` runs instead of the block
    uint64_t count = 0;
    uint64_t bytes = 0;
};

// Walks through a layout piece by piece. The layout must outlive it and stay as it is.
class Cursor {
public:
    explicit Cursor(const Layout &layout) : layout_(&layout) {}

    bool at_end() const { return block_ == layout_->blocks.size() && run_ == layout_->runs.size(); }
    // The block that the next piece comes from; NULL where it comes from the irregular rest.
    const kvf_region *block() const {
        return block_ < layout_->blocks.size() ? &layout_->blocks[block_] : nullptr;
    }

    // At most `most` bytes (a row that is wider is split; one run is the least) and at most `most_runs`
    // runs. Must not be called at the end.
    Piece next(uint64_t most, uint64_t most_runs);

    void skip_to_end() {
        block_ = layout_->blocks.size();
        run_ = layout_->runs.size();
    }

private:
    const Layout *layout_;
    size_t block_ = 0;
    uint64_t row_ = 0;    // in the block
    uint64_t column_ = 0; // bytes of that row that have been handed out
    size_t run_ = 0;
};

// Checks regions that came from outside: no zero sizes, no overflow, pitches at least as wide as rows.
// Returns the size of the buffer that they need. Throws KVF_ERR_INVALID_ARGUMENT.
uint64_t regions_size(const kvf_region *regions, uint64_t count);

} // namespace kvf
