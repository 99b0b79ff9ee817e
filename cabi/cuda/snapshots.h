// Snapshots on a CUDA device: copies of layouts in device memory, which saves read while the cache
// changes.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "core/thread_pool.h"
#include "cuda/tables.h"
#include "jobs/device.h"

namespace kvf {

// Any thread. One snapshot is taken at a time.
class CudaSnapshots {
public:
    // `kernels` may be NULL: runs are then copied one by one. The copy threads free snapshots that
    // have been moved.
    CudaSnapshots(const CudaContext &context, const CudaKernels *kernels, ThreadPool &copy_threads);
    // The copy threads must have ended.
    ~CudaSnapshots();
    CudaSnapshots(const CudaSnapshots &) = delete;
    CudaSnapshots &operator=(const CudaSnapshots &) = delete;

    // As Device::snapshot(). The memory that it returns must not outlive this object.
    Device::Snapshot take(const Layout &layout);

    // Frees what no snapshot uses.
    void trim() noexcept;
    uint64_t pinned_bytes() const { return pinned_bytes_; }
    // The stream that snapshots are taken on.
    CUstream stream() const { return stream_; }

private:
    class Memory;
    struct Packed;

    CUdeviceptr allocate(uint64_t bytes);
    void leave(CUdeviceptr address) noexcept;
    void free_left() noexcept;
    bool take_left(CUdeviceptr &address);

    void pack(const Layout &layout, Packed &packed);
    void pack_block(const kvf_region &block, Packed &packed);
    void pack_irregular(const Layout &layout, Packed &packed);
    void gather(const Piece &piece, CUdeviceptr to);
    void copy(CUdeviceptr to, uint64_t from, uint64_t bytes);
    void synchronize();

    const CudaContext &context_;
    const CudaDriver &driver_;
    const CudaKernels *const kernels_;
    ThreadPool &copy_threads_;
    const uint64_t max_pitch_;
    const bool stream_ordered_; // memory is allocated and freed in the order of the stream
    CUstream stream_ = nullptr;

    std::mutex taking_mutex_;
    std::unique_ptr<CudaRowTable> rows_;
    std::atomic<uint64_t> pinned_bytes_{0}; // of rows_

    std::mutex freeing_mutex_;           // held while memory is freed
    std::mutex left_mutex_;              // guards left_
    std::vector<CUdeviceptr> left_;      // snapshots that have been moved, to be freed
    std::atomic<uint32_t> allocated_{0}; // snapshots that have not been freed
};

} // namespace kvf
