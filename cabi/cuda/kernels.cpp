#include "cuda/kernels.h"

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
    context_.clean_up([this](const CudaDriver &driver) { driver.cuModuleUnload(module_); });
}

void CudaKernels::launch(Direction direction, CUdeviceptr staging, CudaRows rows, uint32_t blocks,
                         CUstream stream) const {
    constexpr unsigned int kThreads = 512; // THREADS in gather.cu
    void *parameters[] = {
        &staging,    &rows.table, &rows.count,    &rows.address_distance, &rows.offset_distance,
        &rows.pitch, &rows.width, &rows.rows_each};
    const CudaDriver &driver = context_.driver();
    driver.check(driver.cuLaunchKernel(direction == Direction::Save ? gather_ : scatter_, blocks, 1,
                                       1, kThreads, 1, 1, 0, stream, parameters, nullptr),
                 "cuLaunchKernel");
}

} // namespace kvf
