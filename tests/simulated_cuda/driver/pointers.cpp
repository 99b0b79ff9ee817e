// What programs ask about a pointer: whether it is device or pinned memory, and whose.
#include <cstring>

#include "allocations.h"
#include "entry.h"

using namespace simulated;

namespace {

template <class T>
void write(void *to, T value) {
    std::memcpy(to, &value, sizeof value);
}

unsigned int memory_type(const Allocation *a) {
    if (!a) return 0;
    return a->on_device ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
}

// Writes one attribute of a pointer; NULL: of a pointer that lies in no allocation.
CUresult attribute_of(void *value, CUpointer_attribute attribute, const Allocation *a,
                      uint64_t address) {
    switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT: write(value, a ? a->context->handle : nullptr); break;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE: write<unsigned int>(value, memory_type(a)); break;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: write<CUdeviceptr>(value, a ? address : 0); break;
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
        if (a && a->on_device) return CUDA_ERROR_INVALID_VALUE;
        write<uint64_t>(value, a ? address : 0);
        break;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID: write<unsigned long long>(value, a ? a->id : 0); break;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED: write<unsigned int>(value, 0); break;
    case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE:
        write<unsigned int>(value, a && a->on_device && !a->ordered ? 1 : 0);
        break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
        write<int>(value, a ? a->context->device : CU_DEVICE_INVALID);
        break;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
        write<CUdeviceptr>(value, a ? a->range.address : 0);
        break;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE: write<size_t>(value, a ? a->range.bytes : 0); break;
    case CU_POINTER_ATTRIBUTE_MAPPED: write<unsigned int>(value, a ? 1 : 0); break;
    default: return CUDA_ERROR_NOT_SUPPORTED;
    }
    return CUDA_SUCCESS;
}

} // namespace

extern "C" {

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
    ENTER(cuPointerGetAttribute);
    if (!value) return CUDA_ERROR_INVALID_VALUE;
    Lock lock(driver().mutex);
    const Allocation *allocation = allocation_of(address);
    if (!allocation) return CUDA_ERROR_INVALID_VALUE;
    return attribute_of(value, attribute, allocation, address);
}

// Unlike cuPointerGetAttribute(), knows no error for an unknown pointer: the values are zero, and
// the ordinal is CU_DEVICE_INVALID.
CUresult cuPointerGetAttributes(unsigned int count, CUpointer_attribute *attributes, void **values,
                                CUdeviceptr address) {
    ENTER(cuPointerGetAttributes);
    if (count == 0 || !attributes || !values) return CUDA_ERROR_INVALID_VALUE;
    Lock lock(driver().mutex);
    const Allocation *allocation = allocation_of(address);
    for (unsigned int i = 0; i < count; ++i) {
        const CUresult error = attribute_of(values[i], attributes[i], allocation, address);
        if (error == CUDA_ERROR_INVALID_VALUE)
            write<uint64_t>(values[i], 0); // device memory has no host address
        else if (error)
            return error;
    }
    return CUDA_SUCCESS;
}

} // extern "C"
