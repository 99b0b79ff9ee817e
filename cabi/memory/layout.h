// What a transfer consists of: regions, joined while they are recorded into few large ones, and handed
// out again in pieces of the size that a device wants.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "core/status.h"

namespace kvf {

enum class Direction : uint32_t { Save = 0, Load = 1 };

// A fragment that joined no other: one of the irregular rest. Always smaller than kLongRun.
struct Run {
    uint64_t address;
    uint64_t offset; // in the buffer
    uint64_t bytes;
};

// The irregular rest of one tensor.
struct RunTable {
    std::vector<Run> runs;
    bool packed; // in the buffer each run begins where the one before it ends
};

// A stretch of the irregular rest: the first `count` runs of a table, all moved by the same distances. The
// tensors of a cache are fragmented alike, so that one table serves them all.
struct Span {
    std::shared_ptr<const RunTable> table;
    uint64_t count = 0;
    uint64_t address_distance = 0, offset_distance = 0; // modulo 2^64
};

// A run of this many bytes is worth a copy of its own.
constexpr uint64_t kLongRun = 64 << 10;
// Fewer rows than this are not worth a two-dimensional copy of their own.
constexpr uint64_t kFewRows = 8;

// Regions of one device, in the order in which they were recorded.
struct Layout {
    std::vector<kvf_region> blocks; // long runs (rows == 1) and two-dimensional blocks
    std::vector<Span> spans;        // the irregular rest
    uint64_t bytes = 0;

    bool empty() const { return blocks.empty() && spans.empty(); }
    uint64_t segments() const {
        uint64_t count = blocks.size();
        for (const Span &span : spans) count += span.count;
        return count;
    }
};

// Joins fragments as they come: neighbours in memory and in the buffer become one run, and runs of one
// width at one pitch become one block. Half a million fragments of a cache whose sequences were
// decoded in turn become a few dozen blocks; where they advanced at random, one tensor's runs become
// the table for all.
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

    // What comes next lies in another allocation: it joins nothing that came before.
    void begin_allocation() {
        keep_run();
        run_ = {};
        keep_block();
    }

    // What comes next lies elsewhere, in another tensor, and may be fragmented as the last one was.
    void begin_tensor();

    uint64_t fragments() const { return fragments_; }

    // After begin_tensor(): the bytes of all that take() would give.
    uint64_t bytes() const { return layout_.bytes; }
    // Hands over what has been recorded up to the last begin_tensor(); the rest is recorded as if nothing had
    // been taken.
    Layout take();

    Layout finish();

private:
    void keep_run() {
        if (block_.rows > 1 && run_.bytes == block_.width &&
            run_.address == block_.address + block_.rows * block_.pitch &&
            run_.offset == block_.offset + block_.rows * block_.buffer_pitch) {
            ++block_.rows;
        } else if (run_.bytes) {
            start_block();
        }
    }
    void start_block();
    void keep_block();
    void keep_rows(uint64_t rows);
    void keep_irregular(const Run &run);
    void stop_matching();

    Layout layout_;
    uint64_t fragments_ = 0;

    // A fragment passes through three stages, each of which holds on to what may still grow.
    Run run_{};          // neighbours; bytes == 0: none
    kvf_region block_{}; // rows; rows == 0: none
    // The irregular rest of the tensor: equal to a former tensor's so far, or else a table of its own.
    std::shared_ptr<const RunTable> pattern_;             // of a former tensor; NULL: none
    uint64_t matched_ = 0;                                // of its runs
    bool matching_ = false;                               // else the tensor's runs are in own_
    uint64_t address_distance_ = 0, offset_distance_ = 0; // from the pattern's
    std::vector<Run> own_;
};

// A part of a layout: one block, or a stretch of the irregular rest.
struct Piece {
    kvf_region block{};
    const Run *runs = nullptr; // not NULL: `count` runs instead of the block ...
    uint64_t count = 0;
    const std::shared_ptr<const RunTable> *table =
        nullptr; // ... of this table; lives as long as the layout
    uint64_t address_distance = 0, offset_distance = 0; // as in Span
    uint64_t bytes = 0;

    // Where it begins in the buffer.
    uint64_t offset() const { return runs ? runs->offset + offset_distance : block.offset; }
    // In the buffer, all of it is one run.
    bool is_packed() const {
        return runs ? (*table)->packed : block.rows == 1 || block.buffer_pitch == block.width;
    }
    Run run(uint64_t i) const {
        return {runs[i].address + address_distance, runs[i].offset + offset_distance,
                runs[i].bytes};
    }
};

// Walks through a layout piece by piece. The layout must outlive it and stay as it is.
class Cursor {
public:
    Cursor() = default; // to be assigned to
    explicit Cursor(const Layout &layout) : layout_(&layout) {}

    bool at_end() const {
        return block_ == layout_->blocks.size() && span_ == layout_->spans.size();
    }
    // The block that the next piece comes from; NULL where it comes from the irregular rest.
    const kvf_region *block() const {
        return block_ < layout_->blocks.size() ? &layout_->blocks[block_] : nullptr;
    }

    // Where it comes from the irregular rest: the span, and what of it has not been handed out.
    const Span &span() const { return layout_->spans[span_]; }
    uint64_t runs_left() const { return span().count - run_; }

    // At most `most` bytes (a row that is wider is split; one run is the least) and at most `most_runs`
    // runs. Must not be called at the end.
    Piece next(uint64_t most, uint64_t most_runs);

    void skip_blocks() { block_ = layout_->blocks.size(); }

private:
    const Layout *layout_ = nullptr;
    size_t block_ = 0;
    uint64_t row_ = 0;    // in the block
    uint64_t column_ = 0; // bytes of that row that have been handed out
    size_t span_ = 0;
    uint64_t run_ = 0; // in the span
};

// The layouts of one transfer, in the order in which they are recorded. The first may be moved while the
// next are still being recorded. Pieces that were handed out stay valid as long as this lives.
class Parts {
public:
    void add(Layout &&layout) {
        if (closed_ || layout.empty()) return;
        bytes_ += layout.bytes;
        layouts_.push_back(std::move(layout));
        if (!cursor_valid_) settle();
    }
    // Nothing more will come.
    void close() { closed_ = true; }
    // Nothing more will be handed out.
    void cut_short() {
        closed_ = true;
        next_ = layouts_.size();
        cursor_valid_ = false;
    }

    bool is_closed() const { return closed_; }
    // There is nothing to hand out at the moment.
    bool empty() const { return !cursor_valid_; }
    bool at_end() const { return empty() && closed_; }
    uint64_t bytes() const { return bytes_; }              // of all that was added
    uint64_t left() const { return bytes_ - handed_out_; } // of what has not been handed out

    // As of a cursor. Must not be called while empty().
    const kvf_region *block() const { return cursor_.block(); }
    const Span &span() const { return cursor_.span(); }
    uint64_t runs_left() const { return cursor_.runs_left(); }
    Piece next(uint64_t most, uint64_t most_runs) {
        const Piece piece = cursor_.next(most, most_runs);
        handed_out_ += piece.bytes;
        if (cursor_.at_end()) settle();
        return piece;
    }

private:
    // Goes on to the next layout, if there is one.
    void settle() {
        cursor_valid_ = next_ < layouts_.size();
        if (cursor_valid_) cursor_ = Cursor(layouts_[next_++]);
    }

    std::deque<Layout> layouts_;
    size_t next_ = 0; // the first that has not been begun
    Cursor cursor_;
    bool cursor_valid_ = false; // it is not at its end
    uint64_t bytes_ = 0, handed_out_ = 0;
    bool closed_ = false;
};

// Checks regions that came from outside: no zero sizes, no overflow, pitches at least as wide as rows.
// Returns the size of the buffer that they need. Throws KVF_ERR_INVALID_ARGUMENT.
uint64_t regions_size(const kvf_region *regions, uint64_t count);

} // namespace kvf
