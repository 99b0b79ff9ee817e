// The gather and scatter kernels (gather.cu), loaded into one context.
#pragma once

#include "cuda/context.h"
#include "memory/pieces.h"

namespace kvf {

// Rows that a kernel moves. Either they are in a table in device memory; the distances are added to
// each row's address and to its place in staging. Or the table has the first rows of regions of one
// shape. Or there is no table, and the rows are those of one region.
struct CudaRows {
    CUdeviceptr table = 0;
    uint32_t count = 0; // of all rows
    uint64_t address_distance = 0;
    uint32_t offset_distance = 0;
    uint64_t pitch = 0;
    uint32_t width = 0;
    uint32_t rows_each = 1; // of the regions whose first rows are in the table

    // Returns the rows of a region, which lie one after another in staging from `place` on.
    static CudaRows of(const kvf_region &region, uint64_t place) {
        CudaRows rows;
        rows.count = static_cast<uint32_t>(region.rows);
        rows.address_distance = region.address;
        rows.offset_distance = static_cast<uint32_t>(place);
        rows.pitch = region.pitch;
        rows.width = static_cast<uint32_t>(region.width);
        return rows;
    }
};

// What regions have in common whose rows the kernel finds from their first rows.
struct CudaShape {
    uint64_t rows = 0, pitch = 0, width = 0;

    static CudaShape of(const kvf_region &region) {
        return {region.rows, region.pitch, region.width};
    }
    bool operator==(const CudaShape &) const = default;
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
