// Device memory for states that are loaded ahead.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "core/thread_pool.h"
#include "cuda/tables.h"

namespace kvf {

// Device memory for one state, and what copies the state from there to its places: tables of rows
// and a stream.
class CudaAheadMemory {
public:
    // Throws KVF_ERR_OUT_OF_MEMORY where the device has no room.
    CudaAheadMemory(const CudaContext &context, uint64_t bytes);
    ~CudaAheadMemory();
    CudaAheadMemory(const CudaAheadMemory &) = delete;
    CudaAheadMemory &operator=(const CudaAheadMemory &) = delete;

    // Device memory of the tables. They pin as much host memory.
    static constexpr uint64_t kTableBytes = CudaResidentTable::kBytes + CudaRowTable::kBytes;

    CUdeviceptr address() const { return memory_.address(); }
    uint64_t bytes() const { return memory_.bytes() - kTableBytes; } // for the state
    CUstream stream() const { return stream_; }
    CudaResidentTable &resident() { return resident_; }
    CudaRowTable &rows() { return rows_; } // for pieces that cannot use the resident table

private:
    const CudaContext &context_;
    const CudaDeviceMemory memory_; // the state, then the tables
    CudaResidentTable resident_;
    CudaRowTable rows_;
    CUstream stream_ = nullptr;
};

// The memory of loads ahead on one device, which is kept for later loads until trim(). Any thread.
class CudaAheadPool {
public:
    // The copy threads free memory that became useless, since freeing waits for everything that the
    // device is doing.
    CudaAheadPool(const CudaContext &context, ThreadPool &copy_threads)
        : context_(context), copy_threads_(copy_threads) {}
    CudaAheadPool(const CudaAheadPool &) = delete;
    CudaAheadPool &operator=(const CudaAheadPool &) = delete;

    // Returns memory for a state of `bytes`, or NULL if there is no room.
    std::unique_ptr<CudaAheadMemory> acquire(uint64_t bytes);
    void release(std::unique_ptr<CudaAheadMemory> memory) noexcept;

    // Whether there is no memory, free or in use.
    bool empty() const;
    // Frees what no load uses.
    void trim() noexcept;
    uint64_t pinned_bytes() const;

private:
    std::unique_ptr<CudaAheadMemory> take_free(uint64_t bytes);
    std::unique_ptr<CudaAheadMemory> allocate(uint64_t bytes) const;

    const CudaContext &context_;
    ThreadPool &copy_threads_;
    mutable std::mutex mutex_;
    std::vector<std::unique_ptr<CudaAheadMemory>> free_;
    size_t count_ = 0; // free or in use
};

} // namespace kvf
