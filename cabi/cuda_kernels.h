// The gather and scatter kernels (gather.cu), loaded into one context.
#pragma once

#include "cuda_driver.h"
#include "layout.h"

namespace kvf {

class CudaKernels {
public:
    // Compiles the PTX for the device. Throws where the driver refuses it.
    explicit CudaKernels(const CudaContext &context);
    ~CudaKernels();
    CudaKernels(const CudaKernels &) = delete;
    CudaKernels &operator=(const CudaKernels &) = delete;

    // Queues the move of `count` rows between where they are and staging. Both are device addresses.
    void launch(Direction direction, CUdeviceptr staging, CUdeviceptr rows, uint32_t count,
                uint32_t blocks, CUstream stream) const;

private:
    const CudaContext &context_;
    CUmodule module_ = nullptr;
    CUfunction gather_ = nullptr, scatter_ = nullptr;
};

// The rows of a launch: written in pinned memory, read by the kernel from device memory. (Read through the
// link, they would keep a kernel waiting on its multiprocessors while the link is full of our own copies.)
class CudaRowTable {
public:
    static constexpr uint32_t kRows = 32768;
    static constexpr uint64_t kBytes = kRows * sizeof(kvferry_row);

    // `place` is device memory of kBytes, which stays the caller's.
    CudaRowTable(const CudaContext &context, CUdeviceptr place);
    ~CudaRowTable();
    CudaRowTable(const CudaRowTable &) = delete;
    CudaRowTable &operator=(const CudaRowTable &) = delete;

    // The rows of pieces that lie one after another in staging. What was launched with the table before
    // must have ended.
    void clear();
    void add(const Piece &piece);
    uint32_t rows() const { return count_; }

    // Queues the copy of the table to the device; and a kernel that works through it, on the same stream.
    void send(CUstream stream) const;
    void launch(const CudaKernels &kernels, Direction direction, CUdeviceptr staging,
                uint32_t blocks, CUstream stream) const;

private:
    const CudaContext &context_;
    const CUdeviceptr place_;
    kvferry_row *rows_ = nullptr;
    uint32_t count_ = 0;
    uint64_t end_ = 0; // in staging
};

} // namespace kvf
