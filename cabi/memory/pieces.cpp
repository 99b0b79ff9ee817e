#include "memory/pieces.h"

#include <algorithm>

namespace kvf {

Piece Cursor::next(uint64_t most, uint64_t most_runs) {
    Piece piece;
    piece.gap = gap_;
    piece.block = layout_->block;
    if (owns_gaps()) gap_ = Piece::Gap::Rewrite;
    if (!this->region()) {
        const Span &span = layout_->spans[span_];
        piece.runs = span.table->runs.data() + run_;
        piece.table = &span.table;
        piece.address_distance = span.address_distance;
        piece.offset_distance = span.offset_distance;
        while (run_ < span.count && piece.count < most_runs) {
            const uint64_t bytes = piece.runs[piece.count].bytes;
            if (piece.count > 0 && piece.bytes + bytes > most) break;
            piece.bytes += bytes;
            ++piece.count;
            ++run_;
        }
        if (run_ == span.count) {
            run_ = 0;
            ++span_;
        }
        return piece;
    }

    const kvf_region &region = layout_->regions[region_];
    piece.region = region;
    piece.region.address += row_ * region.pitch + column_;
    piece.region.offset += row_ * region.buffer_pitch + column_;
    if (column_ > 0 || region.width > most || region.rows == 1) {
        // Part of one row.
        piece.region.rows = 1;
        piece.region.width = std::min(most, region.width - column_);
        column_ += piece.region.width;
        if (column_ == region.width) {
            column_ = 0;
            ++row_;
        }
    } else {
        piece.region.rows =
            std::min(std::max<uint64_t>(1, most / region.width), region.rows - row_);
        row_ += piece.region.rows;
    }
    piece.bytes = piece.region.width * piece.region.rows;
    if (row_ == region.rows) {
        row_ = 0;
        ++region_;
    }
    return piece;
}

} // namespace kvf
