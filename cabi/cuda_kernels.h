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

    // Queues the move of `count` rows between where they are and staging. Both addresses are the device's.
    void launch(Direction direction, CUdeviceptr staging, CUdeviceptr rows, uint32_t count,
                uint32_t blocks, CUstream stream) const;

private:
    const CudaContext &context_;
    CUmodule module_ = nullptr;
    CUfunction gather_ = nullptr, scatter_ = nullptr;
};

// A table of rows in pinned memory that the device reads through the link.
class CudaRowTable {
public:
    static constexpr uint32_t kRows = 65536; // 1 MiB

    explicit CudaRowTable(const CudaContext &context);
    ~CudaRowTable();
    CudaRowTable(const CudaRowTable &) = delete;
    CudaRowTable &operator=(const CudaRowTable &) = delete;

    // Writes the rows of a piece, which lie one after another in staging. Returns how many.
    uint32_t fill(const Piece &piece);
    CUdeviceptr device_address() const { return device_address_; }

private:
    const CudaContext &context_;
    kvferry_row *rows_ = nullptr;
    CUdeviceptr device_address_ = 0;
};

} // namespace kvf
