#include "jobs/load_ahead.h"

#include <algorithm>

namespace kvf {

StagedParts::StagedParts(const std::vector<BufferPart> &parts) {
    for (const BufferPart &part : parts) {
        by_offset_.push_back({part, bytes_});
        bytes_ += part.bytes;
    }
    std::sort(by_offset_.begin(), by_offset_.end(),
              [](const Part &a, const Part &b) { return a.in_buffer.offset < b.in_buffer.offset; });
}

uint64_t StagedParts::place_of(uint64_t offset) const {
    const auto behind =
        std::partition_point(by_offset_.begin(), by_offset_.end(),
                             [&](const Part &part) { return part.in_buffer.offset <= offset; });
    const Part &part = *(behind - 1);
    return part.begin + (offset - part.in_buffer.offset);
}

Layout StagedParts::layout(uint64_t address) const {
    Layout layout;
    layout.bytes = bytes_;
    for (const auto &[part, begin] : by_offset_)
        layout.regions.push_back({address + begin, part.bytes, 1, 0, part.offset, 0});
    std::sort(layout.regions.begin(), layout.regions.end(),
              [](const kvf_region &a, const kvf_region &b) { return a.address < b.address; });
    return layout;
}

} // namespace kvf
