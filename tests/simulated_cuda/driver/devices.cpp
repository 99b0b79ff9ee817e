// The driver itself: cuInit(), its version, the texts of its errors; and the devices that it has.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <thread>

#include "entry.h"

using namespace simulated;

extern "C" {

// ---- The driver and its errors ------------------------------------------------------------------

CUresult cuInit(unsigned int flags) {
    ENTER_EARLY(cuInit);
    Driver &d = driver();
    if (d.forked) return CUDA_ERROR_NOT_INITIALIZED;
    Lock lock(d.mutex);
    if (const uint64_t ms = d.settings.init_ms) {
        lock.unlock();
        std::this_thread::sleep_for(std::chrono::milliseconds(ms));
        lock.lock();
    }
    if (flags) return CUDA_ERROR_INVALID_VALUE;
    if (d.settings.init_error) return static_cast<CUresult>(d.settings.init_error);
    if (d.settings.devices == 0) return CUDA_ERROR_NO_DEVICE;
    d.initialized = true;
    return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
    ENTER_EARLY(cuDriverGetVersion);
    if (!version) return CUDA_ERROR_INVALID_VALUE;
    Lock lock(driver().mutex);
    *version = static_cast<int>(driver().settings.driver_version);
    return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char **name) {
    ENTER_EARLY(cuGetErrorName);
    switch (error) {
#define NAME(name_, number, text)                                                                  \
    case name_: *name = #name_; return CUDA_SUCCESS;
        CUDA_DRIVER_ERRORS(NAME)
#undef NAME
    }
    *name = nullptr;
    return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    ENTER_EARLY(cuGetErrorString);
    switch (error) {
#define TEXT(name, number, text_)                                                                  \
    case name: *text = text_; return CUDA_SUCCESS;
        CUDA_DRIVER_ERRORS(TEXT)
#undef TEXT
    }
    *text = nullptr;
    return CUDA_ERROR_INVALID_VALUE;
}

// ---- Devices ------------------------------------------------------------------------------------

CUresult cuDeviceGetCount(int *count) {
    ENTER(cuDeviceGetCount);
    if (!count) return CUDA_ERROR_INVALID_VALUE;
    Lock lock(driver().mutex);
    *count = static_cast<int>(driver().settings.devices);
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    ENTER(cuDeviceGet);
    if (!device) return CUDA_ERROR_INVALID_VALUE;
    Lock lock(driver().mutex);
    if (!driver().has_device(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char *name, int size, CUdevice device) {
    ENTER(cuDeviceGetName);
    Lock lock(driver().mutex);
    if (!driver().has_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    if (!name || size <= 0) return CUDA_ERROR_INVALID_VALUE;
    std::snprintf(name, static_cast<size_t>(size), "Simulated GPU %d", device);
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    ENTER(cuDeviceGetAttribute);
    Lock lock(driver().mutex);
    if (!driver().has_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    if (!value) return CUDA_ERROR_INVALID_VALUE;
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_PITCH: *value = kMaxPitch; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT: *value = 3; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_PCI_BUS_ID: *value = 0x10 + device; break;
    case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED:
        *value = driver().settings.memory_pools != 0;
        break;
    case CU_DEVICE_ATTRIBUTE_GPU_OVERLAP:
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM:
    case CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_CAN_USE_STREAM_WAIT_VALUE_NOR: *value = 1; break;
    default: *value = 0; break;
    }
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetPCIBusId(char *id, int size, CUdevice device) {
    ENTER(cuDeviceGetPCIBusId);
    Lock lock(driver().mutex);
    if (!driver().has_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    if (!id || size < 13) return CUDA_ERROR_INVALID_VALUE;
    std::snprintf(id, static_cast<size_t>(size), "0000:%02x:00.0",
                  0x10u + static_cast<unsigned int>(device));
    return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    ENTER(cuDeviceTotalMem_v2);
    Lock lock(driver().mutex);
    if (!driver().has_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    if (!bytes) return CUDA_ERROR_INVALID_VALUE;
    *bytes = std::min(driver().settings.device_bytes, driver().settings.device_limit);
    return CUDA_SUCCESS;
}

} // extern "C"
