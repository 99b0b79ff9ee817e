#include "layout.h"

#include <algorithm>

namespace kvf {

void LayoutBuilder::add(const kvf_region &region) {
    if (region.rows == 1) return add(region.address, region.offset, region.width);
    if (region.pitch == region.width && region.buffer_pitch == region.width) {
        return add(region.address, region.offset, region.width * region.rows);
    }
    if (region.rows < kFewRows) {
        for (uint64_t i = 0; i < region.rows; ++i) {
            add(region.address + i * region.pitch, region.offset + i * region.buffer_pitch,
                region.width);
        }
        return;
    }
    keep_block();
    fragments_ += region.rows;
    layout_.bytes += region.width * region.rows;
    layout_.blocks.push_back(region);
}

// The fragment does not continue what is being grown.
void LayoutBuilder::start_anew(uint64_t address, uint64_t offset, uint64_t bytes) {
    if (block_.rows > 1 && block_.rows < kFewRows) {
        // Its last row may begin something with the fragment: a longer run, or the next block. Rows that
        // repeat with a period of their own would else be paired wrongly for ever.
        kvf_region last = block_;
        last.address += (block_.rows - 1) * block_.pitch;
        last.offset += (block_.rows - 1) * block_.buffer_pitch;
        const bool adjacent =
            address == last.address + last.width && offset == last.offset + last.width;
        const bool next_row =
            bytes == last.width && address >= last.address + bytes && offset >= last.offset + bytes;
        if (adjacent || next_row) {
            keep_rows(block_.rows - 1);
            last.rows = adjacent ? 1 : 2;
            last.width += adjacent ? bytes : 0;
            last.pitch = address - last.address;
            last.buffer_pitch = offset - last.offset;
            block_ = last;
            return;
        }
    }
    keep_block();
    block_ = {address, bytes, 1, 0, offset, 0};
}

void LayoutBuilder::keep_block() {
    if (block_.rows >= kFewRows || (block_.rows >= 1 && block_.width >= kLongRun)) {
        layout_.blocks.push_back(block_);
    } else {
        keep_rows(block_.rows);
    }
    block_ = {};
}

void LayoutBuilder::keep_rows(uint64_t rows) {
    for (uint64_t i = 0; i < rows; ++i) {
        const uint64_t address = block_.address + i * block_.pitch;
        const uint64_t offset = block_.offset + i * block_.buffer_pitch;
        if (block_.width >= kLongRun) {
            layout_.blocks.push_back({address, block_.width, 1, 0, offset, 0});
        } else {
            layout_.runs.push_back({address, offset, block_.width});
        }
    }
}

Layout LayoutBuilder::finish() {
    keep_block();
    return std::move(layout_);
}

Piece Cursor::next(uint64_t most, uint64_t most_runs) {
    Piece piece;
    if (!this->block()) {
        piece.runs = &layout_->runs[run_];
        while (run_ < layout_->runs.size() && piece.count < most_runs &&
               (piece.count == 0 || piece.bytes + layout_->runs[run_].bytes <= most)) {
            piece.bytes += layout_->runs[run_].bytes;
            ++piece.count;
            ++run_;
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

uint64_t regions_size(const kvf_region *regions, uint64_t count) {
    if (count && !regions) throw Error(KVF_ERR_INVALID_ARGUMENT, "regions is NULL");
    uint64_t size = 0;
    for (uint64_t i = 0; i < count; ++i) {
        const kvf_region &r = regions[i];
        const auto refuse = [i](const char *why) {
            throw Error(KVF_ERR_INVALID_ARGUMENT,
                        format("region %llu: %s", static_cast<unsigned long long>(i), why));
        };
        if (r.address == 0) refuse("address is 0");
        if (r.width == 0 || r.rows == 0) refuse("width and rows must not be 0");
        uint64_t span = 0, buffer_span = 0;
        if (r.rows > 1) {
            if (r.pitch < r.width || r.buffer_pitch < r.width) refuse("pitch is less than width");
            if (__builtin_mul_overflow(r.rows - 1, r.pitch, &span) ||
                __builtin_mul_overflow(r.rows - 1, r.buffer_pitch, &buffer_span)) {
                refuse("is larger than the address space");
            }
        }
        uint64_t end = 0, buffer_end = 0;
        if (__builtin_add_overflow(span, r.width, &span) ||
            __builtin_add_overflow(r.address, span, &end) ||
            __builtin_add_overflow(buffer_span, r.width, &buffer_span) ||
            __builtin_add_overflow(r.offset, buffer_span, &buffer_end)) {
            refuse("is larger than the address space");
        }
        size = std::max(size, buffer_end);
    }
    return size;
}

} // namespace kvf
