#include "jobs/load_ahead.h"

#include <algorithm>
#include <utility>

namespace kvf {
StagedParts::StagedParts(std::vector<BufferPart> parts) : parts_(std::move(parts)) {
    for (const BufferPart &part : parts_) {
        begins_.push_back(bytes_);
        bytes_ += part.bytes;
    }
}

uint64_t StagedParts::place_of(uint64_t offset) const {
    const auto behind =
        std::partition_point(parts_.begin(), parts_.end(),
                             [&](const BufferPart &part) { return part.offset <= offset; });
    const auto index = static_cast<size_t>(behind - parts_.begin()) - 1;
    return begins_[index] + (offset - parts_[index].offset);
}

} // namespace kvf
