// Bounds the host memory that an engine pins for its own use, over all of its devices.
#pragma once

#include <atomic>
#include <cstdint>

namespace kvf {

// Any thread.
class CudaPinnedBudget {
public:
    explicit CudaPinnedBudget(uint64_t bytes) : left_(bytes) {}
    CudaPinnedBudget(const CudaPinnedBudget &) = delete;
    CudaPinnedBudget &operator=(const CudaPinnedBudget &) = delete;

    // Returns false, and takes nothing, if less is left.
    bool acquire(uint64_t bytes) noexcept {
        uint64_t left = left_.load(std::memory_order_relaxed);
        do {
            if (left < bytes) return false;
        } while (!left_.compare_exchange_weak(left, left - bytes, std::memory_order_relaxed));
        return true;
    }
    void release(uint64_t bytes) noexcept { left_.fetch_add(bytes, std::memory_order_relaxed); }

private:
    std::atomic<uint64_t> left_;
};

} // namespace kvf
