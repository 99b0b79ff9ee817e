#include "cuda/arena.h"

#include <algorithm>

namespace kvf {
namespace {

constexpr uint64_t round_up(uint64_t bytes) {
    return (bytes + CudaArena::kAlignment - 1) / CudaArena::kAlignment * CudaArena::kAlignment;
}

} // namespace

void CudaArena::allocate() {
    for (uint64_t bytes = most_;; bytes = bytes / 2 / kAlignment * kAlignment) {
        try {
            CudaDeviceMemory memory(context_, bytes);
            std::lock_guard lock(mutex_);
            memory_ = std::move(memory);
            return;
        } catch (const Error &error) {
            if (error.status != KVF_ERR_OUT_OF_MEMORY || bytes / 2 < kLeast) throw;
        }
    }
}

CudaSegment CudaArena::acquire(uint64_t least, uint64_t most) {
    std::lock_guard lock(mutex_);
    if (count_ == kSegments) return {};
    const uint64_t end_of_memory = memory_.address() + memory_.bytes();
    uint64_t begin = memory_.address(); // of the gap before segment i
    for (size_t i = 0; i <= count_; ++i) {
        const uint64_t end = i < count_ ? segments_[i].address : end_of_memory;
        if (end - begin >= std::max(least, kAlignment)) {
            const CudaSegment acquired{begin, std::min(round_up(most), end - begin)};
            std::move_backward(segments_.begin() + i, segments_.begin() + count_,
                               segments_.begin() + count_ + 1);
            segments_[i] = acquired;
            ++count_;
            return acquired;
        }
        if (i < count_) begin = segments_[i].address + segments_[i].bytes;
    }
    return {};
}

void CudaArena::release(CudaSegment segment) noexcept {
    std::lock_guard lock(mutex_);
    const auto end = segments_.begin() + count_;
    const auto it = std::find_if(segments_.begin(), end, [&](const CudaSegment &other) {
        return other.address == segment.address;
    });
    std::move(it + 1, end, it);
    --count_;
}

void CudaArena::trim() noexcept {
    CudaDeviceMemory unused; // is freed without the lock
    std::lock_guard lock(mutex_);
    if (count_ == 0) unused = std::move(memory_);
}

} // namespace kvf
