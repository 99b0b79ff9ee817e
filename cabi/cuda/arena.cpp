#include "cuda/arena.h"

#include <algorithm>

namespace kvf {

void CudaArena::allocate() {
    const CudaCurrent current(context_);
    const CudaDriver &driver = context_.driver();
    for (uint64_t bytes = most_;; bytes = bytes / 2 / kAlignment * kAlignment) {
        CUdeviceptr memory = 0;
        const CUresult result = driver.cuMemAlloc(&memory, bytes);
        if (result == CUDA_ERROR_OUT_OF_MEMORY && bytes / 2 >= kLeast) continue;
        driver.check(result, "cuMemAlloc");
        std::lock_guard lock(mutex_);
        memory_ = memory;
        bytes_ = bytes;
        return;
    }
}

CudaStaging CudaArena::take(uint64_t least, uint64_t most) {
    std::lock_guard lock(mutex_);
    if (count_ == kSegments) return {};
    uint64_t begin = memory_;
    for (size_t i = 0; i <= count_; ++i) {
        const uint64_t end = i < count_ ? segments_[i].memory : memory_ + bytes_;
        if (end - begin >= std::max(least, kAlignment)) {
            const uint64_t wanted = (most + kAlignment - 1) / kAlignment * kAlignment;
            const CudaStaging taken{begin, std::min(wanted, end - begin)};
            std::move_backward(segments_.begin() + i, segments_.begin() + count_,
                               segments_.begin() + count_ + 1);
            segments_[i] = taken;
            ++count_;
            return taken;
        }
        if (i < count_) begin = segments_[i].memory + segments_[i].bytes;
    }
    return {};
}

void CudaArena::put_back(CudaStaging staging) noexcept {
    std::lock_guard lock(mutex_);
    const auto end = segments_.begin() + count_;
    const auto it = std::find_if(segments_.begin(), end, [&](const CudaStaging &other) {
        return other.memory == staging.memory;
    });
    std::move(it + 1, end, it);
    --count_;
}

void CudaArena::trim() noexcept {
    CUdeviceptr memory = 0;
    {
        std::lock_guard lock(mutex_);
        if (count_ > 0) return;
        std::swap(memory, memory_);
        bytes_ = 0;
    }
    if (!memory) return;
    try {
        const CudaCurrent current(context_);
        context_.driver().cuMemFree(memory);
    } catch (const Error &) {
        // The context is gone, and the memory with it.
    }
}

} // namespace kvf
