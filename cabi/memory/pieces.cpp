#include "memory/pieces.h"

#include <algorithm>

namespace kvf {

Piece Cursor::next(uint64_t most, uint64_t most_runs) {
    Piece piece;
    if (!this->block()) {
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

    const kvf_region &block = layout_->blocks[block_];
    piece.block = block;
    piece.block.address += row_ * block.pitch + column_;
    piece.block.offset += row_ * block.buffer_pitch + column_;
    if (column_ > 0 || block.width > most || block.rows == 1) {
        // Part of one row.
        piece.block.rows = 1;
        piece.block.width = std::min(most, block.width - column_);
        column_ += piece.block.width;
        if (column_ == block.width) {
            column_ = 0;
            ++row_;
        }
    } else {
        piece.block.rows = std::min(std::max<uint64_t>(1, most / block.width), block.rows - row_);
        row_ += piece.block.rows;
    }
    piece.bytes = piece.block.width * piece.block.rows;
    if (row_ == block.rows) {
        row_ = 0;
        ++block_;
    }
    return piece;
}

} // namespace kvf
