// The device memory that a lane stages pieces in: one allocation, handed out in segments. Urgent
// jobs get a few large segments, since each copy costs the copy engine some microseconds; paced
// jobs get several small ones.
#pragma once

#include <array>
#include <mutex>

#include "cuda/memory.h"

namespace kvf {

struct CudaSegment {
    CUdeviceptr address = 0; // a multiple of CudaArena::kAlignment; 0: no segment
    uint64_t bytes = 0;
    explicit operator bool() const { return address != 0; }
};

// One thread acquires and releases segments; any thread may trim.
class CudaArena {
public:
    static constexpr uint64_t kAlignment = 512;
    static constexpr uint64_t kLeast = 256 << 10; // less is of no use

    // The arena will have `bytes` at most. Allocates nothing yet.
    CudaArena(const CudaContext &context, uint64_t bytes) : context_(context), most_(bytes) {}
    CudaArena(const CudaArena &) = delete;
    CudaArena &operator=(const CudaArena &) = delete;

    // Allocates the memory: less where the device is short of it. Throws if there is less than
    // kLeast.
    void allocate();
    bool is_allocated() const { return bytes() > 0; }
    uint64_t bytes() const {
        std::lock_guard lock(mutex_);
        return memory_.bytes();
    }
    // Returns the first free segment of `least` bytes or more, cut to `most`; none where no gap is
    // that large.
    CudaSegment acquire(uint64_t least, uint64_t most);
    void release(CudaSegment segment) noexcept;
    // Frees the memory, unless some of it is in use.
    void trim() noexcept;

private:
    static constexpr size_t kSegments = 8; // a lane has as many slots

    const CudaContext &context_;
    const uint64_t most_;
    mutable std::mutex mutex_;
    CudaDeviceMemory memory_;
    std::array<CudaSegment, kSegments> segments_; // in use, in the order of their addresses
    size_t count_ = 0;
};

} // namespace kvf
