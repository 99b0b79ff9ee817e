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
    driver.check(driver.cuLaunchKernel(direction == Direction::Save ? gather_ : scatter_, blocks, 1,
                                       1, kThreads, 1, 1, 0, stream, parameters, nullptr),
                 "cuLaunchKernel");
}

CudaRowTable::CudaRowTable(const CudaContext &context, CUdeviceptr place)
    : context_(context), place_(place) {
    const CudaDriver &driver = context.driver();
    const CudaCurrent current(context);
    void *memory;
    driver.check(driver.cuMemHostAlloc(&memory, kBytes, CU_MEMHOSTALLOC_PORTABLE),
                 "cuMemHostAlloc");
    rows_ = static_cast<kvferry_row *>(memory);
}

CudaRowTable::~CudaRowTable() {
    try {
        const CudaCurrent current(context_);
        context_.driver().cuMemFreeHost(rows_);
    } catch (const Error &) {
        // The context is gone, and the memory with it.
    }
}

void CudaRowTable::clear() {
    count_ = 0;
    end_ = 0;
}

void CudaRowTable::add(const Piece &piece) {
    const auto add_row = [this](uint64_t address, uint64_t bytes) {
        rows_[count_++] = {address, static_cast<uint32_t>(end_), static_cast<uint32_t>(bytes)};
        end_ += bytes;
    };
    if (piece.runs) {
        for (uint64_t i = 0; i < piece.count; ++i) {
            add_row(piece.runs[i].address + piece.address_distance, piece.runs[i].bytes);
        }
    } else {
        const kvf_region &block = piece.block;
        for (uint64_t i = 0; i < block.rows; ++i) {
            add_row(block.address + i * block.pitch, block.width);
        }
    }
}

void CudaRowTable::send(CUstream stream) const {
    const CudaDriver &driver = context_.driver();
    driver.check(driver.cuMemcpyHtoDAsync(place_, rows_, count_ * sizeof(kvferry_row), stream),
                 "cuMemcpyHtoDAsync");
}

void CudaRowTable::launch(const CudaKernels &kernels, Direction direction, CUdeviceptr staging,
                          uint32_t blocks, CUstream stream) const {
    kernels.launch(direction, staging, place_, count_, blocks, stream);
}

} // namespace kvf
