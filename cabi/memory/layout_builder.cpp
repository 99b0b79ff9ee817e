#include "memory/layout_builder.h"

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
    keep_region();
    fragments_ += region.rows;
    layout_.bytes += region.width * region.rows;
    layout_.regions.push_back(region);
}

// The run does not continue the region that is being grown.
void LayoutBuilder::start_region() {
    const auto is_next_row = [this](uint64_t address, uint64_t offset) {
        return run_.bytes == region_.width && run_.address >= address + run_.bytes &&
               run_.offset >= offset + run_.bytes;
    };
    const auto pair_with = [this](uint64_t address, uint64_t offset) {
        region_ = {address, run_.bytes, 2, run_.address - address, offset, run_.offset - offset};
    };
    if (region_.rows == 1 && is_next_row(region_.address, region_.offset)) {
        return pair_with(region_.address, region_.offset);
    }
    if (region_.rows > 1 && region_.rows < kFewRows) {
        // The last of its rows may be the first of a region that goes on with this one: rows that
        // repeat with a period of their own would else be paired wrongly for ever.
        const uint64_t before = region_.rows - 1;
        const uint64_t address = region_.address + before * region_.pitch;
        const uint64_t offset = region_.offset + before * region_.buffer_pitch;
        if (is_next_row(address, offset)) {
            keep_rows(before);
            return pair_with(address, offset);
        }
    }
    keep_region();
    region_ = {run_.address, run_.bytes, 1, 0, run_.offset, 0};
}

void LayoutBuilder::keep_region() {
    if (region_.rows >= kFewRows || (region_.rows > 0 && region_.width >= kLongRun)) {
        layout_.regions.push_back(region_);
    } else {
        keep_rows(region_.rows);
    }
    region_ = {};
}

// The first rows of the region, each for itself.
void LayoutBuilder::keep_rows(uint64_t rows) {
    for (uint64_t i = 0; i < rows; ++i) {
        const uint64_t address = region_.address + i * region_.pitch;
        const uint64_t offset = region_.offset + i * region_.buffer_pitch;
        if (region_.width >= kLongRun) {
            layout_.regions.push_back({address, region_.width, 1, 0, offset, 0});
        } else {
            keep_irregular({address, offset, region_.width});
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

} // namespace kvf
