#include "cuda_kernels.h"

#include "gather_ptx.h" // made from gather.ptx by the build

namespace kvf {

CudaKernels::CudaKernels(const CudaContext &context) : context_(context) {
    const CudaDriver &driver = context.driver();
    const CudaCurrent current(context);
    driver.check(driver.cuModuleLoadData(&module_, kGatherPtx), "cuModuleLoadData");
    try {
        driver.check(driver.cuModuleGetFunction(&gather_, module_, "kvferry_gather"),
                     "cuModuleGetFunction");
        driver.check(driver.cuModuleGetFunction(&scatter_, module_, "kvferry_scatter"),
                     "cuModuleGetFunction");
    } catch (...) {
        driver.cuModuleUnload(module_);
        throw;
    }
}

CudaKernels::~CudaKernels() {
    try {
        const CudaCurrent current(context_);
        context_.driver().cuModuleUnload(module_);
    } catch (const Error &) {
        // The context is gone, and the module with it.
    }
}

void CudaKernels::launch(Direction direction, CUdeviceptr staging, CUdeviceptr rows, uint32_t count,
                         uint32_t blocks, CUstream stream) const {
    constexpr unsigned int kThreads = 512; // THREADS in gather.cu
    void *parameters[] = {&staging, &rows, &count};
    const CudaDriver &driver = context_.driver();
    driver.check(driver.cuLaunchKernel(direction == Direction::Save ? gather_ : scatter_, blocks, 1, 1,
                                       kThreads, 1, 1, 0, stream, parameters, nullptr),
                 "cuLaunchKernel");
}

CudaRowTable::CudaRowTable(const CudaContext &context) : context_(context) {
    const CudaDriver &driver = context.driver();
    const CudaCurrent current(context);
    void *memory;
    driver.check(driver.cuMemHostAlloc(&memory, kRows * sizeof(kvferry_row),
                                       CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP),
                 "cuMemHostAlloc");
    rows_ = static_cast<kvferry_row *>(memory);
    const CUresult result = driver.cuMemHostGetDevicePointer(&device_address_, memory, 0);
    if (result != CUDA_SUCCESS) {
        driver.cuMemFreeHost(memory);
        driver.check(result, "cuMemHostGetDevicePointer");
    }
}

CudaRowTable::~CudaRowTable() {
    try {
        const CudaCurrent current(context_);
        context_.driver().cuMemFreeHost(rows_);
    } catch (const Error &) {
        // The context is gone, and the memory with it.
    }
}

uint32_t CudaRowTable::fill(const Piece &piece) {
    uint64_t offset = 0;
    if (piece.runs) {
        for (uint64_t i = 0; i < piece.count; ++i) {
            const Run run = piece.run(i);
            rows_[i] = {run.address, static_cast<uint32_t>(offset), static_cast<uint32_t>(run.bytes)};
            offset += run.bytes;
        }
        return static_cast<uint32_t>(piece.count);
    }
    const kvf_region &block = piece.block;
    for (uint64_t i = 0; i < block.rows; ++i, offset += block.width) {
        rows_[i] = {block.address + i * block.pitch, static_cast<uint32_t>(offset),
                    static_cast<uint32_t>(block.width)};
    }
    return static_cast<uint32_t>(block.rows);
}

} // namespace kvf
