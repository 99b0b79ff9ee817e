// Hands layouts out in pieces of the size that a device wants.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <utility>

#include "memory/layout.h"

namespace kvf {

// A part of a layout: one region, or a stretch of the irregular rest.
struct Piece {
    kvf_region region{};
    const Run *runs = nullptr; // not NULL: `count` runs instead of the region ...
    uint64_t count = 0;
    const std::shared_ptr<const RunTable> *table =
        nullptr; // ... of this table; lives as long as the layout
    uint64_t address_distance = 0, offset_distance = 0; // as in Span
    uint64_t bytes = 0;

    // What may be done with the bytes of the buffer between the piece before it and this one.
    enum class Gap {
        Read,    // both are in one buffer
        Rewrite, // they are the job's: Layout::owns_gaps
        Nothing, // they may belong to another buffer
    };
    Gap gap = Gap::Read;
    uint32_t block = 0; // the layout's

    uint64_t rows() const { return runs ? count : region.rows; }
    // Where the piece begins in the buffer.
    uint64_t offset() const { return runs ? runs->offset + offset_distance : region.offset; }
    // True if the whole piece is one run in the buffer.
    bool is_packed() const {
        return runs ? (*table)->packed : region.rows == 1 || region.buffer_pitch == region.width;
    }
    Run run(uint64_t i) const {
        return {runs[i].address + address_distance, runs[i].offset + offset_distance,
                runs[i].bytes};
    }
};

// Walks through a layout piece by piece. The layout must outlive the cursor, and must not change.
class Cursor {
public:
    Cursor() = default; // to be assigned to
    explicit Cursor(const Layout &layout)
        : layout_(&layout), gap_(layout.owns_gaps ? Piece::Gap::Nothing : Piece::Gap::Read) {}

    bool at_end() const {
        return region_ == layout_->regions.size() && span_ == layout_->spans.size();
    }
    // The region that the next piece comes from; NULL where it comes from the irregular rest.
    const kvf_region *region() const {
        return region_ < layout_->regions.size() ? &layout_->regions[region_] : nullptr;
    }

    // Where the next piece comes from the irregular rest: its span, and how many runs of the span
    // are left.
    const Span &span() const { return layout_->spans[span_]; }
    uint64_t runs_left() const { return span().count - run_; }

    // Whether a save may write the gaps between the pieces. Where the layout has regions and an
    // irregular rest, one may lie in the other's gaps.
    bool owns_gaps() const {
        return layout_->owns_gaps && (layout_->regions.empty() || layout_->spans.empty());
    }

    // Returns a piece of at most `most` bytes and `most_runs` runs. A row that is wider is split; a
    // run is not. Must not be called at the end.
    Piece next(uint64_t most, uint64_t most_runs);

    void skip_regions() { region_ = layout_->regions.size(); }

private:
    const Layout *layout_ = nullptr;
    Piece::Gap gap_ = Piece::Gap::Read; // before the next piece
    size_t region_ = 0;
    uint64_t row_ = 0;    // in the region
    uint64_t column_ = 0; // bytes of that row that have been handed out
    size_t span_ = 0;
    uint64_t run_ = 0; // in the span
};

// The layouts of one leg, in the order in which they are recorded. The first may move while the
// next are still recorded. Pieces stay valid as long as the parts live.
class Parts {
public:
    void add(Layout &&layout) {
        if (closed_ || layout.empty()) return;
        bytes_ += layout.bytes;
        layouts_.push_back(std::move(layout));
        if (!cursor_valid_) settle();
    }
    // Nothing more will be added.
    void close() { closed_ = true; }
    // Nothing more will be handed out.
    void cut_short() {
        closed_ = true;
        next_ = layouts_.size();
        cursor_valid_ = false;
    }

    bool is_closed() const { return closed_; }
    // True if there is nothing to hand out at the moment.
    bool empty() const { return !cursor_valid_; }
    bool at_end() const { return empty() && closed_; }
    uint64_t bytes() const { return bytes_; }              // of all that was added
    uint64_t left() const { return bytes_ - handed_out_; } // of what has not been handed out

    // As of a cursor. Must not be called while empty().
    const kvf_region *region() const { return cursor_.region(); }
    const Span &span() const { return cursor_.span(); }
    uint64_t runs_left() const { return cursor_.runs_left(); }
    bool owns_gaps() const { return cursor_.owns_gaps(); }
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

} // namespace kvf
