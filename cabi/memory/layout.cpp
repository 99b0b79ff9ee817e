#include "memory/layout.h"

#include <algorithm>
#include <utility>

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
    keep_run();
    run_ = {};
    keep_block();
    fragments_ += region.rows;
    layout_.bytes += region.width * region.rows;
    layout_.blocks.push_back(region);
}

// The run does not continue the block that is being grown.
void LayoutBuilder::start_block() {
    const auto is_next_row = [this](uint64_t address, uint64_t offset) {
        return run_.bytes == block_.width && run_.address >= address + run_.bytes &&
               run_.offset >= offset + run_.bytes;
    };
    const auto pair_with = [this](uint64_t address, uint64_t offset) {
        block_ = {address, run_.bytes, 2, run_.address - address, offset, run_.offset - offset};
    };
    if (block_.rows == 1 && is_next_row(block_.address, block_.offset)) {
        return pair_with(block_.address, block_.offset);
    }
    if (block_.rows > 1 && block_.rows < kFewRows) {
        // The last of its rows may be the first of a block that goes on with this one: rows that repeat
        // with a period of their own would else be paired wrongly for ever.
        const uint64_t before = block_.rows - 1;
        const uint64_t address = block_.address + before * block_.pitch;
        const uint64_t offset = block_.offset + before * block_.buffer_pitch;
        if (is_next_row(address, offset)) {
            keep_rows(before);
            return pair_with(address, offset);
        }
    }
    keep_block();
    block_ = {run_.address, run_.bytes, 1, 0, run_.offset, 0};
}

void LayoutBuilder::keep_block() {
    if (block_.rows >= kFewRows || (block_.rows > 0 && block_.width >= kLongRun)) {
        layout_.blocks.push_back(block_);
    } else {
        keep_rows(block_.rows);
    }
    block_ = {};
}

// The first rows of the block, each for itself.
void LayoutBuilder::keep_rows(uint64_t rows) {
    for (uint64_t i = 0; i < rows; ++i) {
        const uint64_t address = block_.address + i * block_.pitch;
        const uint64_t offset = block_.offset + i * block_.buffer_pitch;
        if (block_.width >= kLongRun) {
            layout_.blocks.push_back({address, block_.width, 1, 0, offset, 0});
        } else {
            keep_irregular({address, offset, block_.width});
        }
    }
}

void LayoutBuilder::keep_irregular(const Run &run) {
    if (matching_) {
        if (matched_ < pattern_->runs.size()) {
            const Run &expected = pattern_->runs[matched_];
            if (matched_ == 0) {
                address_distance_ = run.address - expected.address;
                offset_distance_ = run.offset - expected.offset;
            }
            if (run.bytes == expected.bytes &&
                run.address == expected.address + address_distance_ &&
                run.offset == expected.offset + offset_distance_) {
                ++matched_;
                return;
            }
        }
        stop_matching();
    }
    own_.push_back(run);
}

// The tensor has turned out to be fragmented in its own way: what did match goes into its table.
void LayoutBuilder::stop_matching() {
    matching_ = false;
    own_.reserve(pattern_->runs.size());
    for (uint64_t i = 0; i < matched_; ++i) {
        Run run = pattern_->runs[i];
        run.address += address_distance_;
        run.offset += offset_distance_;
        own_.push_back(run);
    }
}

void LayoutBuilder::begin_tensor() {
    begin_allocation();
    if (matching_ && matched_ > 0) {
        layout_.spans.push_back({pattern_, matched_, address_distance_, offset_distance_});
    } else if (!own_.empty()) {
        bool packed = true;
        for (size_t i = 1; i < own_.size(); ++i) {
            packed &= own_[i].offset == own_[i - 1].offset + own_[i - 1].bytes;
        }
        pattern_ = std::make_shared<const RunTable>(RunTable{std::move(own_), packed});
        own_ = {};
        layout_.spans.push_back({pattern_, pattern_->runs.size(), 0, 0});
    }
    matching_ = pattern_ != nullptr;
    matched_ = 0;
}

Layout LayoutBuilder::take() { return std::exchange(layout_, {}); }

Layout LayoutBuilder::finish() {
    begin_tensor();
    return take();
}

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
