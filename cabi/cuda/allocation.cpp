#include "cuda/allocation.h"

namespace kvf {

std::optional<CudaAllocation> find_allocation(const CudaContext &context, uint64_t address) {
    const CudaDriver &driver = context.driver();
    unsigned int type = 0, in_one_piece = 0;
    int ordinal = -1;
    CUdeviceptr begin = 0;
    size_t bytes = 0;
    CUpointer_attribute attributes[] = {
        CU_POINTER_ATTRIBUTE_MEMORY_TYPE, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
        CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, CU_POINTER_ATTRIBUTE_RANGE_SIZE,
        CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE};
    void *values[] = {&type, &ordinal, &begin, &bytes, &in_one_piece};
    const CudaCurrent current(context);
    // Unlike cuPointerGetAttribute, this function succeeds for any pointer, and gives zeros for one
    // that is not CUDA's. An error means that the device is lost. It does not mean that the memory
    // is the host's: who read it there would crash.
    driver.check(driver.cuPointerGetAttributes(5, attributes, values, address),
                 "cuPointerGetAttributes");
    if (type != CU_MEMORYTYPE_DEVICE || ordinal < 0) return std::nullopt;
    if (begin == 0) {
        begin = address;
        bytes = 1;
    }
    return CudaAllocation{ordinal, begin, begin + bytes, in_one_piece != 0};
}

} // namespace kvf
