// Device memory that a lane stages pieces in: one allocation, handed out in segments. A few large segments for urgent
// jobs, for each copy costs the engine some microseconds; several small ones where jobs are paced.
#pragma once

#include <array>
#include <mutex>

#include "cuda/driver.h"

namespace kvf {

struct CudaStaging {
    CUdeviceptr memory = 0; // aligned as kAlignment; 0: none
    uint64_t bytes = 0;
    explicit operator bool() const { return memory != 0; }
};

// One thread takes and gives back; any thread may trim.
class CudaArena {
public:
    static constexpr uint64_t kAlignment = 512;
    static constexpr uint64_t kLeast = 256 << 10; // less is of no use

    // `bytes` at most. Takes nothing yet.
    CudaArena(const CudaContext &context, uint64_t bytes) : context_(context), most_(bytes) {}
    ~CudaArena() { trim(); }
    CudaArena(const CudaArena &) = delete;
    CudaArena &operator=(const CudaArena &) = delete;

    // Has the memory from the driver: less where that is short. Throws where there is less than kLeast.
    void allocate();
    bool is_allocated() const { return bytes() > 0; }
    uint64_t bytes() const {
        std::lock_guard lock(mutex_);
        return bytes_;
    }
    // `least` to `most` bytes, what is free first; none where no gap is as large.
    CudaStaging take(uint64_t least, uint64_t most);
    void put_back(CudaStaging staging) noexcept;
    // Gives the memory back to the system, unless some of it is in use.
    void trim() noexcept;

private:
    static constexpr size_t kSegments = 8; // a lane has as many slots

    const CudaContext &context_;
    const uint64_t most_;
    mutable std::mutex mutex_;
    CUdeviceptr memory_ = 0;
    uint64_t bytes_ = 0;
    std::array<CudaStaging, kSegments> segments_; // in the order of their addresses
    size_t count_ = 0;
};

} // namespace kvf
