// The gather and scatter kernels (gather.cu), loaded into one context.
#pragma once

#include "cuda/context.h"
#include "memory/pieces.h"

namespace kvf {

// Rows that a kernel moves. Either they are in a table in device memory; the distances are added to
// each row's address and to its place in staging. Or there is no table, and the rows have one width
// and one pitch.
struct CudaRows {
    CUdeviceptr table = 0;
    uint32_t count = 0;
    uint64_t address_distance = 0;
    uint32_t offset_distance = 0;
    uint64_t pitch = 0;
    uint32_t width = 0;

    // Returns the rows of a block, which lie one after another in staging from `place` on.
    static CudaRows of(const kvf_region &block, uint64_t place) {
        CudaRows rows;
        rows.count = static_cast<uint32_t>(block.rows);
        rows.address_distance = block.address;
        rows.offset_distance = static_cast<uint32_t>(place);
        rows.pitch = block.pitch;
        rows.width = static_cast<uint32_t>(block.width);
        return rows;
    }
};

class CudaKernels {
public:
    // Compiles the PTX for the device. Throws if the driver refuses it.
    explicit CudaKernels(const CudaContext &context);
    ~CudaKernels();
    CudaKernels(const CudaKernels &) = delete;
    CudaKernels &operator=(const CudaKernels &) = delete;

    // Queues a kernel that moves the rows between the cache and staging.
    void launch(Direction direction, CUdeviceptr staging, CudaRows rows, uint32_t blocks,
                CUstream stream) const;

private:
    const CudaContext &context_;
    CUmodule module_ = nullptr;
    CUfunction gather_ = nullptr, scatter_ = nullptr;
};

} // namespace kvf
