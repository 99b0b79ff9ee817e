// Device memory and pinned host memory: allocation, limits, attributes of pointers, access outside
// of an allocation.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "driver_test.h"

namespace {

// ---- What a real driver does too ----------------------------------------------------------------

void pointer_attributes_tell_device_from_pinned_and_unknown() {
    Session s;
    const CUdeviceptr device = allocate(10000);
    unsigned char *pinned = allocate_host(10000);
    const size_t page = 4096;
    void *registered = std::aligned_alloc(page, 4 * page);
    std::memset(registered, 1, 4 * page);
    OK(cuda.cuMemHostRegister(registered, 2 * page, CU_MEMHOSTREGISTER_PORTABLE));
    RETURNS(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, cuda.cuMemHostRegister(registered, page, 0));

    unsigned int type = 0;
    int ordinal = -1;
    CUcontext context = nullptr;
    for (const CUdeviceptr address : {device, device + 9999}) {
        OK(cuda.cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address));
        CHECK(type == CU_MEMORYTYPE_DEVICE);
        OK(cuda.cuPointerGetAttribute(&ordinal, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address));
        CHECK(ordinal == 0);
        OK(cuda.cuPointerGetAttribute(&context, CU_POINTER_ATTRIBUTE_CONTEXT, address));
        CHECK(context == s.context);
    }
    CUdeviceptr start = 0;
    size_t size = 0;
    OK(cuda.cuPointerGetAttribute(&start, CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, device + 77));
    OK(cuda.cuPointerGetAttribute(&size, CU_POINTER_ATTRIBUTE_RANGE_SIZE, device + 77));
    CHECK(start == device);
    CHECK(size == 10000);
    for (const CUdeviceptr address : {as_device(pinned), as_device(registered) + page}) {
        OK(cuda.cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address));
        CHECK(type == CU_MEMORYTYPE_HOST);
        CUdeviceptr mapped = 0;
        OK(cuda.cuMemHostGetDevicePointer(&mapped, reinterpret_cast<void *>(address), 0));
        CHECK(mapped == address);
    }
    const CUdeviceptr unknown = as_device(registered) + 3 * page;
    RETURNS(CUDA_ERROR_INVALID_VALUE,
            cuda.cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, unknown));
    CUpointer_attribute attributes[] = {CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
                                        CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
                                        CU_POINTER_ATTRIBUTE_CONTEXT};
    void *values[] = {&type, &ordinal, &context};
    OK(cuda.cuPointerGetAttributes(3, attributes, values, unknown));
    CHECK(type == 0);
    CHECK(ordinal == CU_DEVICE_INVALID);
    CHECK(context == nullptr);
    OK(cuda.cuPointerGetAttributes(3, attributes, values, device + 5));
    CHECK(type == CU_MEMORYTYPE_DEVICE && ordinal == 0 && context == s.context);

    OK(cuda.cuMemHostUnregister(registered));
    RETURNS(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, cuda.cuMemHostUnregister(registered));
    OK(cuda.cuMemFreeHost(pinned));
    OK(cuda.cuMemFree(device));
    RETURNS(CUDA_ERROR_INVALID_VALUE,
            cuda.cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, device));
    std::free(registered);
}

void wrong_arguments_are_refused() {
    Session s;
    const CUdeviceptr device = allocate(64);
    Bytes pageable(64);
    RETURNS(CUDA_ERROR_INVALID_VALUE, cuda.cuMemAlloc(nullptr, 5));
    CUdeviceptr none = 0;
    RETURNS(CUDA_ERROR_INVALID_VALUE, cuda.cuMemAlloc(&none, 0));
    RETURNS(CUDA_ERROR_OUT_OF_MEMORY, cuda.cuMemAlloc(&none, size_t{1} << 50));
    RETURNS(CUDA_ERROR_INVALID_VALUE,
            cuda.cuMemcpyDtoDAsync(device, as_device(pageable.data()), 64, s.stream));
    OK(cuda.cuMemcpyDtoHAsync(pageable.data(), device, 0, s.stream));
    OK(cuda.cuMemFree(0));
    OK(cuda.cuMemFree(device));
}

// ---- What only the simulated driver can show ----------------------------------------------------

void memory_is_limited() {
    Session s;
    kvfsim_set("device_limit", 1 << 20);
    kvfsim_set("pinned_limit", 1 << 16);
    CUdeviceptr a = allocate(1 << 19), b = 0;
    RETURNS(CUDA_ERROR_OUT_OF_MEMORY, cuda.cuMemAlloc(&b, (1 << 19) + 1));
    size_t free_bytes = 0, total = 0;
    OK(cuda.cuMemGetInfo(&free_bytes, &total));
    CHECK(free_bytes == 1 << 19 && total == 1 << 20);
    OK(cuda.cuMemFree(a));
    void *host = nullptr;
    RETURNS(CUDA_ERROR_OUT_OF_MEMORY, cuda.cuMemHostAlloc(&host, (1 << 16) + 1, 0));
    Bytes memory(1 << 17);
    RETURNS(CUDA_ERROR_OUT_OF_MEMORY, cuda.cuMemHostRegister(memory.data(), memory.size(), 0));
    CHECK(kvfsim_count("peak_device_bytes") == 1 << 19);
}

void access_outside_of_an_allocation_is_sticky() {
    CUcontext old = nullptr;
    {
        Session s;
        old = s.context;
        const CUdeviceptr a = allocate(1000);
        unsigned char *host = allocate_host(2000);
        OK(cuda.cuMemcpyDtoHAsync(host, a, 1001, s.stream));
        RETURNS(CUDA_ERROR_ILLEGAL_ADDRESS, cuda.cuStreamSynchronize(s.stream));
        RETURNS(CUDA_ERROR_ILLEGAL_ADDRESS, cuda.cuMemcpyDtoHAsync(host, a, 10, s.stream));
        CUevent event = nullptr;
        RETURNS(CUDA_ERROR_ILLEGAL_ADDRESS, cuda.cuEventCreate(&event, 0));
        RETURNS(CUDA_ERROR_ILLEGAL_ADDRESS, cuda.cuMemFreeHost(host)); // which frees the memory
        RETURNS(CUDA_ERROR_ILLEGAL_ADDRESS, cuda.cuMemFree(a));
        CHECK(kvfsim_count("sticky_errors") == 1);
    }
    Session next; // a new context works
    CHECK(next.context != old);
    OK(cuda.cuMemFree(allocate(10)));
    RETURNS(CUDA_ERROR_INVALID_CONTEXT, cuda.cuCtxPushCurrent(old));
}

void unmapped_host_memory_is_an_error_not_a_crash() {
    // Large, so that other threads cannot map memory to all of the hole.
    const size_t size = 256 << 20;
    for (const bool save : {true, false}) {
        Session s;
        const CUdeviceptr a = allocate(size);
        void *host =
            mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        OK(cuda.cuMemHostRegister(host, size, 0));
        kvfsim_hold("copy", 1, 0);
        OK(save ? cuda.cuMemcpyDtoHAsync(host, a, size, s.stream)
                : cuda.cuMemcpyHtoDAsync(a, host, size, s.stream));
        munmap(static_cast<char *>(host) + size / 2, size / 2);
        kvfsim_release();
        RETURNS(CUDA_ERROR_ILLEGAL_ADDRESS, cuda.cuStreamSynchronize(s.stream));
        RETURNS(CUDA_ERROR_ILLEGAL_ADDRESS, cuda.cuMemHostUnregister(host));
        munmap(host, size / 2);
        cuda.cuMemFree(a);
    }
    Session s;
    const CUdeviceptr a = allocate(4096);
    void *none = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    munmap(none, size);
    RETURNS(CUDA_ERROR_INVALID_VALUE, cuda.cuMemHostRegister(none, 4096, 0));
    RETURNS(CUDA_ERROR_ILLEGAL_ADDRESS, cuda.cuMemcpyHtoDAsync(a, none, 4096, s.stream));
    cuda.cuMemFree(a);
}

void device_memory_cannot_be_touched_directly() {
    Session s;
    const CUdeviceptr a = allocate(4096);
    const pid_t child = fork();
    if (child == 0) {
        std::signal(SIGSEGV, SIG_DFL); // a sanitizer's own handler would print a report
        *reinterpret_cast<volatile char *>(a) = 1;
        _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
    OK(cuda.cuMemFree(a));
}

void freeing_memory_in_use_is_noticed() {
    Session s;
    const CUdeviceptr a = allocate(4096);
    unsigned char *host = allocate_host(4096);
    kvfsim_hold("copy", 1, 0);
    OK(cuda.cuMemcpyDtoHAsync(host, a, 4096, s.stream));
    CHECK(kvfsim_wait_held(1, 10000) == 1);
    std::thread release([] {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        kvfsim_release();
    });
    OK(cuda.cuMemFreeHost(host)); // waits for the copy
    release.join();
    CHECK(kvfsim_count("hazards") == 1);
    OK(cuda.cuMemFree(a));
    CHECK(kvfsim_count("hazards") == 1);
}

} // namespace

const std::vector<Test> kAnyDriver = {
    TEST(pointer_attributes_tell_device_from_pinned_and_unknown),
    TEST(wrong_arguments_are_refused),
};
const std::vector<Test> kSimulatedOnly = {
    TEST(memory_is_limited),
    TEST(access_outside_of_an_allocation_is_sticky),
    TEST(unmapped_host_memory_is_an_error_not_a_crash),
    TEST(device_memory_cannot_be_touched_directly),
    TEST(freeing_memory_in_use_is_noticed),
};
