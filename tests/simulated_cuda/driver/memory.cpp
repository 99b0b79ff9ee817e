// Device memory and pinned host memory: what programs allocate, register and free.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <thread>

#include "allocations.h"
#include "contexts.h"
#include "entry.h"
#include "operations.h"
#include "streams.h"

using namespace simulated;

namespace {

// Lets the time pass that an allocation takes. Without the mutex.
void spend_allocation_time() {
    uint64_t us;
    {
        Lock lock(driver().mutex);
        us = driver().settings.allocation_us;
    }
    if (us) std::this_thread::sleep_for(std::chrono::microseconds(us));
}

} // namespace

extern "C" {

CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t bytes) {
    ENTER_UNSAFE(cuMemAlloc_v2);
    if (!address || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    spend_allocation_time();
    Lock lock(driver().mutex);
    ContextPtr context;
    if (CUresult error = current(&context)) return error;
    uint64_t found = 0;
    const CUresult result = allocate_device(context, bytes, &found);
    if (!result) *address = found;
    return result;
}

CUresult cuMemFree_v2(CUdeviceptr address) {
    ENTER_UNSAFE(cuMemFree_v2);
    if (address == 0) return CUDA_SUCCESS;
    Lock lock(driver().mutex);
    const Allocation *allocation = allocation_of(address);
    if (!allocation || !allocation->on_device || allocation->range.address != address)
        return CUDA_ERROR_INVALID_VALUE;
    const ContextPtr context = allocation->context;
    release_allocation(lock, address, false);
    return context->error;
}

// Allocates at once. (A driver allocates in the order of the stream, and so can reuse memory that
// the stream frees before.)
CUresult cuMemAllocAsync(CUdeviceptr *address, size_t bytes, CUstream stream) {
    ENTER(cuMemAllocAsync);
    if (!address || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    spend_allocation_time();
    Driver &d = driver();
    Lock lock(d.mutex);
    if (!d.settings.memory_pools) return CUDA_ERROR_NOT_SUPPORTED;
    StreamPtr found;
    if (CUresult error = find_current_stream(stream, &found)) return error;
    uint64_t at = 0;
    if (CUresult error = allocate_device(found->context, bytes, &at)) return error;
    d.allocations.at(at).ordered = true;
    *address = at;
    return CUDA_SUCCESS;
}

// Frees in the order of the stream, and waits for no other operation.
CUresult cuMemFreeAsync(CUdeviceptr address, CUstream stream) {
    ENTER(cuMemFreeAsync);
    if (address == 0) return CUDA_ERROR_INVALID_VALUE;
    Lock lock(driver().mutex);
    StreamPtr found;
    if (CUresult error = find_current_stream(stream, &found)) return error;
    const Allocation *allocation = allocation_of(address);
    if (!allocation || !allocation->on_device || allocation->range.address != address)
        return CUDA_ERROR_INVALID_VALUE;
    Operation operation;
    operation.run = [address] {
        Lock inner(driver().mutex);
        const Allocation *freed = allocation_of(address);
        if (!freed || freed->range.address != address) return CUDA_ERROR_INVALID_VALUE;
        free_in_order(address);
        return CUDA_SUCCESS;
    };
    submit(found, std::move(operation));
    return CUDA_SUCCESS;
}

CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total_bytes) {
    ENTER(cuMemGetInfo_v2);
    if (!free_bytes || !total_bytes) return CUDA_ERROR_INVALID_VALUE;
    Driver &d = driver();
    Lock lock(d.mutex);
    ContextPtr context;
    if (CUresult error = current(&context)) return error;
    const Arena &arena = d.arenas[static_cast<size_t>(context->device)];
    *total_bytes = std::min(arena.bytes, d.settings.device_limit);
    *free_bytes = *total_bytes - std::min<uint64_t>(*total_bytes, arena.allocated);
    return CUDA_SUCCESS;
}

CUresult cuMemHostAlloc(void **address, size_t bytes, unsigned int flags) {
    ENTER_UNSAFE(cuMemHostAlloc);
    if (!address || bytes == 0 || flags > 7) return CUDA_ERROR_INVALID_VALUE;
    spend_allocation_time();
    Lock lock(driver().mutex);
    ContextPtr context;
    if (CUresult error = current(&context)) return error;
    // From the allocator, so that AddressSanitizer watches its edges.
    void *memory = nullptr;
    if (posix_memalign(&memory, 4096, bytes) != 0) return CUDA_ERROR_OUT_OF_MEMORY;
    if (CUresult error = pin(context, {reinterpret_cast<uint64_t>(memory), bytes}, false)) {
        std::free(memory);
        return error;
    }
    *address = memory;
    return CUDA_SUCCESS;
}

CUresult cuMemFreeHost(void *address) {
    ENTER_UNSAFE(cuMemFreeHost);
    Lock lock(driver().mutex);
    const Allocation *allocation = allocation_of(reinterpret_cast<uint64_t>(address));
    if (!allocation || allocation->on_device || allocation->registered ||
        allocation->range.address != reinterpret_cast<uint64_t>(address))
        return CUDA_ERROR_INVALID_VALUE;
    const ContextPtr context = allocation->context;
    release_allocation(lock, allocation->range.address, false);
    return context->error;
}

CUresult cuMemHostRegister_v2(void *address, size_t bytes, unsigned int flags) {
    ENTER_UNSAFE(cuMemHostRegister_v2);
    if (!address || bytes == 0 || flags > 15) return CUDA_ERROR_INVALID_VALUE;
    spend_allocation_time();
    const Range range = {reinterpret_cast<uint64_t>(address), bytes};
    Lock lock(driver().mutex);
    ContextPtr context;
    if (CUresult error = current(&context)) return error;
    if (arena_of(range.address) || !is_mapped(range)) return CUDA_ERROR_INVALID_VALUE;
    return pin(context, range, true);
}

CUresult cuMemHostUnregister(void *address) {
    ENTER_UNSAFE(cuMemHostUnregister);
    if (!address) return CUDA_ERROR_INVALID_VALUE;
    Lock lock(driver().mutex);
    const Allocation *allocation = allocation_of(reinterpret_cast<uint64_t>(address));
    if (!allocation || !allocation->registered ||
        allocation->range.address != reinterpret_cast<uint64_t>(address))
        return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
    const ContextPtr context = allocation->context;
    release_allocation(lock, allocation->range.address, false);
    return context->error;
}

CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr *device_address, void *address,
                                      unsigned int flags) {
    ENTER(cuMemHostGetDevicePointer_v2);
    if (!device_address || flags) return CUDA_ERROR_INVALID_VALUE;
    Lock lock(driver().mutex);
    ContextPtr context;
    if (CUresult error = current(&context)) return error;
    const Allocation *allocation = allocation_of(reinterpret_cast<uint64_t>(address));
    if (!allocation || allocation->on_device) return CUDA_ERROR_INVALID_VALUE;
    *device_address = reinterpret_cast<uint64_t>(address);
    return CUDA_SUCCESS;
}

} // extern "C"
