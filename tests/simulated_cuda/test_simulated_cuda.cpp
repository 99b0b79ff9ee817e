// What the simulated driver keeps. One function per behaviour.
//
//   test_simulated_cuda gather.ptx                  all of it
//   test_simulated_cuda gather.ptx libcuda.so.1     on a real driver: what that must keep as well
#include <dlfcn.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cuda/driver_api.h"
#include "simulated_cuda.h"

namespace {

struct Api {
#define MEMBER(name, symbol, parameters) CUresult(*name) parameters = nullptr;
    CUDA_DRIVER_ENTRY_POINTS(MEMBER)
#undef MEMBER
};
Api cuda;
std::string ptx;
int failures = 0;

void check(bool good, const char *what, int line) {
    if (good) return;
    std::printf("  line %d: %s\n", line, what);
    ++failures;
}
void check_result(CUresult got, CUresult wanted, const char *what, int line) {
    if (got == wanted) return;
    std::printf("  line %d: %s: %d instead of %d\n", line, what, static_cast<int>(got),
                static_cast<int>(wanted));
    ++failures;
}
#define CHECK(...) check((__VA_ARGS__), #__VA_ARGS__, __LINE__)
#define OK(...) check_result((__VA_ARGS__), CUDA_SUCCESS, #__VA_ARGS__, __LINE__)
#define RETURNS(wanted, ...) check_result((__VA_ARGS__), wanted, #__VA_ARGS__, __LINE__)

using Bytes = std::vector<unsigned char>;

Bytes random_bytes(size_t size) {
    static std::mt19937_64 engine(7);
    Bytes bytes(size);
    for (auto &byte : bytes) byte = static_cast<unsigned char>(engine());
    return bytes;
}

void load_api(const char *library, bool simulated) {
    // A real driver must not find its own functions in the simulated one, which this program links.
    void *handle = dlopen(library, RTLD_NOW | (simulated ? 0 : RTLD_DEEPBIND));
    if (!handle) {
        std::printf("%s\n", dlerror());
        std::exit(1);
    }
#define LOAD(name, symbol, parameters)                                                             \
    cuda.name = reinterpret_cast<CUresult(*) parameters>(dlsym(handle, #symbol));
    CUDA_DRIVER_ENTRY_POINTS(LOAD)
#undef LOAD
#define REQUIRE(name, symbol, parameters)                                                          \
    if (!cuda.name) std::printf("no %s in %s\n", #symbol, library), std::exit(1);
    CUDA_DRIVER_REQUIRED(REQUIRE)
#undef REQUIRE
}

// A device's primary context, current on this thread; a stream.
struct Session {
    int device;
    CUcontext context = nullptr;
    CUstream stream = nullptr;

    explicit Session(int device = 0) : device(device) {
        OK(cuda.cuDevicePrimaryCtxRetain(&context, device));
        OK(cuda.cuCtxPushCurrent(context));
        OK(cuda.cuStreamCreateWithPriority(&stream, CU_STREAM_NON_BLOCKING, 0));
    }
    ~Session() {
        cuda.cuStreamDestroy(stream);
        OK(cuda.cuCtxPopCurrent(nullptr));
        OK(cuda.cuDevicePrimaryCtxRelease(device));
    }
    Session(const Session &) = delete;
};

CUdeviceptr allocate(size_t bytes) {
    CUdeviceptr address = 0;
    OK(cuda.cuMemAlloc(&address, bytes));
    return address;
}

unsigned char *allocate_host(size_t bytes) {
    void *address = nullptr;
    OK(cuda.cuMemHostAlloc(&address, bytes, CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP));
    return static_cast<unsigned char *>(address);
}

CUdeviceptr as_device(const void *host) { return reinterpret_cast<CUdeviceptr>(host); }

void upload(const Session &s, CUdeviceptr to, const Bytes &from) {
    OK(cuda.cuMemcpyHtoDAsync(to, from.data(), from.size(), s.stream));
    OK(cuda.cuStreamSynchronize(s.stream));
}

Bytes download(const Session &s, CUdeviceptr from, size_t size) {
    Bytes to(size);
    OK(cuda.cuMemcpyDtoHAsync(to.data(), from, size, s.stream));
    OK(cuda.cuStreamSynchronize(s.stream));
    return to;
}

// ---- What a real driver keeps too ---------------------------------------------------------------

void errors_have_names() {
    const char *text = nullptr;
    OK(cuda.cuGetErrorName(CUDA_ERROR_OUT_OF_MEMORY, &text));
    CHECK(text && std::strcmp(text, "CUDA_ERROR_OUT_OF_MEMORY") == 0);
    OK(cuda.cuGetErrorString(CUDA_ERROR_ILLEGAL_ADDRESS, &text));
    CHECK(text && std::strcmp(text, "an illegal memory access was encountered") == 0);
    RETURNS(CUDA_ERROR_INVALID_VALUE, cuda.cuGetErrorName(static_cast<CUresult>(998), &text));
}

void devices_describe_themselves() {
    int count = 0, value = 0;
    CUdevice device = -1;
    char text[64] = "";
    size_t bytes = 0;
    OK(cuda.cuDeviceGetCount(&count));
    CHECK(count >= 1);
    OK(cuda.cuDeviceGet(&device, 0));
    RETURNS(CUDA_ERROR_INVALID_DEVICE, cuda.cuDeviceGet(&device, count));
    OK(cuda.cuDeviceGetName(text, sizeof text, 0));
    CHECK(std::strlen(text) > 0);
    OK(cuda.cuDeviceGetPCIBusId(text, sizeof text, 0));
    CHECK(std::strlen(text) == 12);
    OK(cuda.cuDeviceTotalMem(&bytes, 0));
    CHECK(bytes > (1u << 30));
    OK(cuda.cuDeviceGetAttribute(&value, CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING, 0));
    CHECK(value == 1);
    OK(cuda.cuDeviceGetAttribute(&value, CU_DEVICE_ATTRIBUTE_MAX_PITCH, 0));
    CHECK(value == 2147483647);
}

void calls_need_a_current_context() {
    CUcontext context = nullptr;
    CUdeviceptr address = 0;
    CUstream stream = nullptr;
    CUevent event = nullptr;
    OK(cuda.cuDevicePrimaryCtxRetain(&context, 0));
    RETURNS(CUDA_ERROR_INVALID_CONTEXT, cuda.cuMemAlloc(&address, 64));
    RETURNS(CUDA_ERROR_INVALID_CONTEXT, cuda.cuStreamCreateWithPriority(&stream, 1, 0));
    OK(cuda.cuCtxPushCurrent(context));
    OK(cuda.cuStreamCreateWithPriority(&stream, CU_STREAM_NON_BLOCKING, 0));
    OK(cuda.cuEventCreate(&event, CU_EVENT_DISABLE_TIMING));
    OK(cuda.cuEventRecord(event, stream));
    CUcontext popped = nullptr;
    OK(cuda.cuCtxPopCurrent(&popped));
    CHECK(popped == context);
    // These know their own.
    OK(cuda.cuStreamSynchronize(stream));
    OK(cuda.cuStreamQuery(stream));
    OK(cuda.cuEventQuery(event));
    OK(cuda.cuEventSynchronize(event));
    OK(cuda.cuCtxGetCurrent(&popped));
    CHECK(popped == nullptr);
    RETURNS(CUDA_ERROR_INVALID_CONTEXT, cuda.cuCtxPopCurrent(&popped));
    OK(cuda.cuCtxPushCurrent(context));
    OK(cuda.cuEventDestroy(event));
    OK(cuda.cuStreamDestroy(stream));
    OK(cuda.cuCtxPopCurrent(nullptr));
    OK(cuda.cuDevicePrimaryCtxRelease(0));
}

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

void a_stream_keeps_its_order() {
    Session s;
    const size_t size = 1 << 20;
    const CUdeviceptr a = allocate(size), b = allocate(size);
    unsigned char *from = allocate_host(size), *to = allocate_host(size);
    CUevent done = nullptr;
    OK(cuda.cuEventCreate(&done, CU_EVENT_DISABLE_TIMING));
    OK(cuda.cuEventQuery(done)); // never recorded
    std::memset(from, 42, size);
    std::memset(to, 0, size);
    for (int round = 0; round < 20; ++round) {
        OK(cuda.cuMemsetD8Async(a, 7, size, s.stream));
        OK(cuda.cuMemcpyHtoDAsync(a + 100, from, size - 200, s.stream));
        OK(cuda.cuMemcpyDtoDAsync(b, a, size, s.stream));
        OK(cuda.cuMemcpyAsync(as_device(to), b, size, s.stream));
    }
    OK(cuda.cuEventRecord(done, s.stream));
    CUresult result;
    while ((result = cuda.cuEventQuery(done)) == CUDA_ERROR_NOT_READY) {
    }
    OK(result);
    CHECK(to[0] == 7 && to[99] == 7 && to[100] == 42 && to[size - 101] == 42 &&
          to[size - 100] == 7);
    OK(cuda.cuEventDestroy(done));
    OK(cuda.cuMemFreeHost(from));
    OK(cuda.cuMemFreeHost(to));
    OK(cuda.cuMemFree(a));
    OK(cuda.cuMemFree(b));
}

void a_stream_waits_for_an_event_of_another() {
    Session s;
    CUstream other = nullptr;
    CUevent event = nullptr;
    OK(cuda.cuStreamCreateWithPriority(&other, CU_STREAM_NON_BLOCKING, 0));
    OK(cuda.cuEventCreate(&event, CU_EVENT_DISABLE_TIMING));
    const size_t size = 8 << 20;
    const CUdeviceptr a = allocate(size);
    unsigned char *to = allocate_host(size);
    for (int round = 1; round < 20; ++round) {
        OK(cuda.cuMemsetD8Async(a, static_cast<unsigned char>(round), size, s.stream));
        OK(cuda.cuEventRecord(event, s.stream));
        OK(cuda.cuStreamWaitEvent(other, event, CU_EVENT_WAIT_DEFAULT));
        OK(cuda.cuMemcpyDtoHAsync(to, a, size, other));
        OK(cuda.cuStreamSynchronize(other));
        CHECK(to[0] == round && to[size - 1] == round);
    }
    OK(cuda.cuMemFreeHost(to));
    OK(cuda.cuMemFree(a));
    OK(cuda.cuEventDestroy(event));
    OK(cuda.cuStreamDestroy(other));
}

void events_tell_the_time_between_them() {
    Session s;
    CUevent first = nullptr, second = nullptr, plain = nullptr;
    OK(cuda.cuEventCreate(&first, CU_EVENT_DEFAULT));
    OK(cuda.cuEventCreate(&second, CU_EVENT_DEFAULT));
    OK(cuda.cuEventCreate(&plain, CU_EVENT_DISABLE_TIMING));
    float milliseconds = -1;
    RETURNS(CUDA_ERROR_INVALID_HANDLE, cuda.cuEventElapsedTime(&milliseconds, first, second));
    for (const CUevent event : {first, second, plain}) OK(cuda.cuEventRecord(event, s.stream));
    OK(cuda.cuStreamSynchronize(s.stream));
    OK(cuda.cuEventElapsedTime(&milliseconds, first, second));
    CHECK(milliseconds >= 0);
    RETURNS(CUDA_ERROR_INVALID_HANDLE, cuda.cuEventElapsedTime(&milliseconds, first, plain));
    for (const CUevent event : {first, second, plain}) OK(cuda.cuEventDestroy(event));
}

void a_stream_waits_for_a_value_and_writes_one() {
    if (!cuda.cuStreamWaitValue32 || !cuda.cuStreamWriteValue32) return;
    Session s;
    auto *words = reinterpret_cast<uint32_t *>(allocate_host(4096));
    words[0] = words[1] = 0;
    OK(cuda.cuStreamWaitValue32(s.stream, as_device(words), 5, CU_STREAM_WAIT_VALUE_GEQ));
    OK(cuda.cuStreamWriteValue32(s.stream, as_device(words + 1), 9, CU_STREAM_WRITE_VALUE_DEFAULT));
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    RETURNS(CUDA_ERROR_NOT_READY, cuda.cuStreamQuery(s.stream));
    CHECK(__atomic_load_n(&words[1], __ATOMIC_ACQUIRE) == 0);
    __atomic_store_n(&words[0], 6, __ATOMIC_RELEASE);
    OK(cuda.cuStreamSynchronize(s.stream));
    CHECK(words[1] == 9);
    OK(cuda.cuMemFreeHost(words));
}

void two_dimensional_copies_respect_pitches() {
    Session s;
    const size_t rows = 100, width = 33, device_pitch = 96, host_pitch = 50;
    const Bytes content = random_bytes(rows * device_pitch);
    const CUdeviceptr device = allocate(content.size());
    upload(s, device, content);
    unsigned char *host = allocate_host(rows * host_pitch);
    std::memset(host, 0, rows * host_pitch);

    CUDA_MEMCPY2D c{};
    c.srcMemoryType = CU_MEMORYTYPE_DEVICE;
    c.srcDevice = device + 3;
    c.srcPitch = device_pitch;
    c.dstMemoryType = CU_MEMORYTYPE_HOST;
    c.dstHost = host;
    c.dstPitch = host_pitch;
    c.WidthInBytes = width;
    c.Height = rows;
    OK(cuda.cuMemcpy2DAsync(&c, s.stream));
    OK(cuda.cuStreamSynchronize(s.stream));
    bool same = true, gaps = true;
    for (size_t row = 0; row < rows; ++row) {
        same &= std::memcmp(host + row * host_pitch, &content[row * device_pitch + 3], width) == 0;
        gaps &= host[row * host_pitch + width] == 0;
    }
    CHECK(same);
    CHECK(gaps);

    std::swap(c.srcMemoryType, c.dstMemoryType);
    c.srcHost = host;
    c.srcPitch = host_pitch;
    c.dstDevice = device;
    c.dstPitch = device_pitch;
    OK(cuda.cuMemcpy2DAsync(&c, s.stream));
    const Bytes after = download(s, device, content.size());
    same = true;
    for (size_t row = 0; row < rows; ++row) {
        const unsigned char *now = &after[row * device_pitch],
                            *before = &content[row * device_pitch];
        same &= std::memcmp(now, before + 3, width) == 0;
        same &= std::memcmp(now + width, before + width, device_pitch - width) == 0;
    }
    CHECK(same);

    c.dstPitch = width - 1;
    RETURNS(CUDA_ERROR_INVALID_VALUE, cuda.cuMemcpy2DAsync(&c, s.stream));
    c.dstPitch = size_t{1} << 31;
    RETURNS(CUDA_ERROR_INVALID_VALUE, cuda.cuMemcpy2DAsync(&c, s.stream));
    c.dstPitch = c.srcPitch = 0;
    OK(cuda.cuMemcpy2DAsync(&c, s.stream)); // rows without gaps
    const Bytes dense = download(s, device, rows * width);
    CHECK(std::memcmp(dense.data(), host, rows * width) == 0);
    c.Height = 0;
    OK(cuda.cuMemcpy2DAsync(&c, s.stream));
    OK(cuda.cuMemFreeHost(host));
    OK(cuda.cuMemFree(device));
}

void no_copy_spans_two_allocations() {
    Session s;
    kvfsim_set("guard_pages", 0);
    const size_t size = 2 << 20;
    std::vector<CUdeviceptr> memory;
    for (int i = 0; i < 32; ++i) memory.push_back(allocate(size));
    std::vector<CUdeviceptr> sorted = memory;
    std::sort(sorted.begin(), sorted.end());
    const auto first = std::adjacent_find(sorted.begin(), sorted.end(),
                                          [&](auto one, auto next) { return one + size == next; });
    if (first == sorted.end()) {
        std::printf("  no two allocations are neighbours\n");
    } else {
        const CUdeviceptr border = *first + size;
        unsigned char *host = allocate_host(size);
        OK(cuda.cuMemcpyDtoHAsync(host, border - 100, 100, s.stream));
        RETURNS(CUDA_ERROR_INVALID_VALUE,
                cuda.cuMemcpyDtoHAsync(host, border - 100, 101, s.stream));
        RETURNS(CUDA_ERROR_INVALID_VALUE,
                cuda.cuMemcpyHtoDAsync(border - 100, host, 101, s.stream));
        CUDA_MEMCPY2D c{};
        c.srcMemoryType = CU_MEMORYTYPE_DEVICE;
        c.srcPitch = 1000;
        c.dstMemoryType = CU_MEMORYTYPE_HOST;
        c.dstHost = host;
        c.dstPitch = c.WidthInBytes = 100;
        c.Height = 3;
        for (const bool swapped : {false, true}) {
            (swapped ? c.dstDevice : c.srcDevice) = border - 2100;
            OK(cuda.cuMemcpy2DAsync(&c, s.stream));
            // Whole rows on both sides, and none across the border.
            (swapped ? c.dstDevice : c.srcDevice) = border - 1500;
            RETURNS(CUDA_ERROR_INVALID_VALUE, cuda.cuMemcpy2DAsync(&c, s.stream));
            std::swap(c.srcMemoryType, c.dstMemoryType);
            std::swap(c.srcPitch, c.dstPitch);
            c.srcHost = host;
        }
        OK(cuda.cuStreamSynchronize(s.stream));
        OK(cuda.cuMemFreeHost(host));
    }
    for (const CUdeviceptr one : memory) OK(cuda.cuMemFree(one));
    kvfsim_set("guard_pages", 1);
}

void copies_of_pageable_memory_are_staged() {
    Session s;
    const CUdeviceptr device = allocate(8 << 20);
    for (const size_t size : {size_t{1000}, size_t{8} << 20}) {
        Bytes content = random_bytes(size);
        const Bytes before = content;
        OK(cuda.cuMemcpyHtoDAsync(device, content.data(), size, s.stream));
        std::fill(content.begin(), content.end(), 0); // it has been read
        Bytes back(size);
        OK(cuda.cuMemcpyDtoHAsync(back.data(), device, size, s.stream));
        CHECK(back == before); // all of it was copied
    }
    OK(cuda.cuMemFree(device));
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
    CUmodule module = nullptr;
    CHECK(cuda.cuModuleLoadData(&module, "not PTX at all") != CUDA_SUCCESS);
    OK(cuda.cuModuleLoadData(&module, ptx.c_str()));
    CUfunction function = nullptr;
    RETURNS(CUDA_ERROR_NOT_FOUND, cuda.cuModuleGetFunction(&function, module, "kvferry_nothing"));
    OK(cuda.cuModuleUnload(module));
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    OK(cuda.cuThreadExchangeStreamCaptureMode(&mode));
    CHECK(mode == CU_STREAM_CAPTURE_MODE_GLOBAL);
    OK(cuda.cuThreadExchangeStreamCaptureMode(&mode));
    CHECK(mode == CU_STREAM_CAPTURE_MODE_RELAXED);
}

// Rows of all lengths and alignments, scattered over a source, packed with gaps in staging.
void gather_and_scatter(const Session &s, const std::vector<uint32_t> &lengths, unsigned int blocks,
                        bool aligned) {
    std::mt19937_64 engine(lengths.size());
    const uint64_t align = aligned ? 16 : 1;
    std::vector<kvferry_row> rows;
    uint64_t offset = 0, address = 0;
    for (const uint32_t bytes : lengths) {
        offset += engine() % 37;
        address += engine() % 101;
        offset = (offset + align - 1) / align * align;
        address = (address + align - 1) / align * align;
        rows.push_back({address, static_cast<uint32_t>(offset), bytes});
        offset += bytes;
        address += bytes;
    }
    for (size_t i = rows.size(); i > 1; --i) std::swap(rows[i - 1], rows[engine() % i]);
    const Bytes memory = random_bytes(address + 64), staging = random_bytes(offset + 64);
    const CUdeviceptr device_memory = allocate(memory.size()),
                      device_staging = allocate(staging.size());
    upload(s, device_memory, memory);
    upload(s, device_staging, staging);
    uint64_t address_distance = aligned ? 0 : engine();
    auto offset_distance = static_cast<uint32_t>(aligned ? 0 : engine());
    Bytes wanted_staging = staging, wanted_memory = random_bytes(memory.size());
    const Bytes other_memory = wanted_memory;
    auto *table =
        reinterpret_cast<kvferry_row *>(allocate_host(rows.size() * sizeof(kvferry_row) + 16));
    for (size_t i = 0; i < rows.size(); ++i) {
        const kvferry_row &row = rows[i];
        std::memcpy(&wanted_staging[row.offset], &memory[row.address], row.bytes);
        std::memcpy(&wanted_memory[row.address], &memory[row.address], row.bytes);
        // By distances of any kind, also such that wrap around.
        table[i] = {row.address + device_memory - address_distance, row.offset - offset_distance,
                    row.bytes};
    }

    CUmodule module = nullptr;
    CUfunction gather = nullptr, scatter = nullptr;
    OK(cuda.cuModuleLoadDataEx(&module, ptx.c_str(), 0, nullptr, nullptr));
    OK(cuda.cuModuleGetFunction(&gather, module, "kvferry_gather"));
    OK(cuda.cuModuleGetFunction(&scatter, module, "kvferry_scatter"));
    CUdeviceptr staging_argument = device_staging, table_argument = as_device(table);
    auto count = static_cast<uint32_t>(rows.size());
    uint64_t pitch = engine(); // of no meaning beside a table
    auto width = static_cast<uint32_t>(engine());
    void *arguments[] = {&staging_argument, &table_argument, &count, &address_distance,
                         &offset_distance,  &pitch,          &width};
    OK(cuda.cuLaunchKernel(gather, blocks, 1, 1, 512, 1, 1, 0, s.stream, arguments, nullptr));
    CHECK(download(s, device_staging, staging.size()) == wanted_staging);
    upload(s, device_memory, other_memory);
    OK(cuda.cuLaunchKernel(scatter, blocks, 1, 1, 512, 1, 1, 0, s.stream, arguments, nullptr));
    CHECK(download(s, device_memory, memory.size()) == wanted_memory);
    OK(cuda.cuModuleUnload(module));
    OK(cuda.cuMemFreeHost(table));
    OK(cuda.cuMemFree(device_memory));
    OK(cuda.cuMemFree(device_staging));
}

// Rows of one width at one pitch, without a table, between two other things in staging.
void gather_and_scatter_regular(const Session &s, uint32_t rows, uint32_t width, uint64_t pitch,
                                uint32_t begin, unsigned int blocks) {
    const uint64_t address = begin % 7;
    const Bytes memory = random_bytes(address + rows * pitch),
                staging = random_bytes(begin + rows * width + 64);
    const CUdeviceptr device_memory = allocate(memory.size()),
                      device_staging = allocate(staging.size());
    upload(s, device_memory, memory);
    upload(s, device_staging, staging);
    const Bytes other_memory = random_bytes(memory.size());
    Bytes wanted_staging = staging, wanted_memory = other_memory;
    for (uint64_t i = 0; i < rows; ++i) {
        const uint64_t at = address + i * pitch;
        std::memcpy(&wanted_staging[begin + i * width], &memory[at], width);
        std::memcpy(&wanted_memory[at], &memory[at], width);
    }
    CUmodule module = nullptr;
    OK(cuda.cuModuleLoadDataEx(&module, ptx.c_str(), 0, nullptr, nullptr));
    CUdeviceptr staging_argument = device_staging, table = 0;
    uint64_t address_distance = device_memory + address;
    void *arguments[] = {
        &staging_argument, &table, &rows, &address_distance, &begin, &pitch, &width};
    for (const bool is_gather : {true, false}) {
        CUfunction function = nullptr;
        OK(cuda.cuModuleGetFunction(&function, module,
                                    is_gather ? "kvferry_gather" : "kvferry_scatter"));
        OK(cuda.cuLaunchKernel(function, blocks, 1, 1, 512, 1, 1, 0, s.stream, arguments, nullptr));
        if (!is_gather) continue;
        CHECK(download(s, device_staging, staging.size()) == wanted_staging);
        upload(s, device_memory, other_memory);
    }
    CHECK(download(s, device_memory, memory.size()) == wanted_memory);
    OK(cuda.cuModuleUnload(module));
    OK(cuda.cuMemFree(device_memory));
    OK(cuda.cuMemFree(device_staging));
}

void kernels_move_regular_rows() {
    Session s;
    for (const unsigned int blocks : {1u, 64u}) {
        gather_and_scatter_regular(s, 1, 1, 1, 0, blocks);
        gather_and_scatter_regular(s, 7, 100, 260, 13, blocks);
        gather_and_scatter_regular(s, 300, 2048, 8192, 268, blocks);
        gather_and_scatter_regular(s, 5000, 2048, 2560, 256, blocks);
        gather_and_scatter_regular(s, 70000, 2, 6, 5, blocks);
        gather_and_scatter_regular(s, 20, 70000, 70001, 4, blocks);
    }
}

void kernels_move_rows_of_every_length_and_alignment() {
    Session s;
    std::mt19937_64 engine(1);
    std::vector<uint32_t> small, mixed, skewed(3000, 2);
    for (uint32_t bytes = 0; bytes <= 200; ++bytes) small.push_back(bytes);
    for (int i = 0; i < 3000; ++i)
        mixed.push_back(static_cast<uint32_t>(engine() % (i % 50 == 0 ? 40000 : 600)));
    skewed[1234] = 3u << 20;
    for (const bool aligned : {true, false}) {
        gather_and_scatter(s, {}, 16, aligned);
        gather_and_scatter(s, {0}, 16, aligned);
        gather_and_scatter(s, {1}, 16, aligned);
        gather_and_scatter(s, {(8u << 20) + 5}, 64, aligned);
        gather_and_scatter(s, {1, 70000, 0, 8192, 8193, 33, 32, 31, 16384}, 3, aligned);
        gather_and_scatter(s, small, 16, aligned);
        gather_and_scatter(s, std::vector<uint32_t>(4096, 2048), 64, aligned);
        gather_and_scatter(s, std::vector<uint32_t>(70000, 2), 64, aligned);
        gather_and_scatter(s, mixed, 1, aligned);
        gather_and_scatter(s, mixed, 64, aligned);
        gather_and_scatter(s, skewed, 16, aligned);
    }
}

// ---- What only the simulated one can show -------------------------------------------------------

void streams_run_beside_one_another() {
    Session s;
    CUstream other = nullptr;
    OK(cuda.cuStreamCreateWithPriority(&other, CU_STREAM_NON_BLOCKING, 0));
    const CUdeviceptr a = allocate(4096), b = allocate(4096);
    CHECK(kvfsim_hold("copy", 1, 0) == 0);
    OK(cuda.cuMemcpyDtoDAsync(b, a, 4096, s.stream));
    CHECK(kvfsim_wait_held(1, 10000) == 1);
    OK(cuda.cuMemsetD8Async(b, 3, 4096, other));
    OK(cuda.cuStreamSynchronize(other));
    RETURNS(CUDA_ERROR_NOT_READY, cuda.cuStreamQuery(s.stream));
    kvfsim_release();
    OK(cuda.cuStreamSynchronize(s.stream));
    OK(cuda.cuStreamDestroy(other));
    OK(cuda.cuMemFree(a));
    OK(cuda.cuMemFree(b));
}

void the_legacy_stream_waits_for_blocking_streams() {
    Session s;
    CUstream blocking = nullptr;
    OK(cuda.cuStreamCreateWithPriority(&blocking, CU_STREAM_DEFAULT, 0));
    const CUdeviceptr a = allocate(4096), b = allocate(4096);
    kvfsim_hold("copy", 1, 0);
    OK(cuda.cuMemcpyDtoDAsync(b, a, 4096, blocking));
    OK(cuda.cuMemsetD8Async(a, 1, 4096, nullptr));
    CHECK(kvfsim_wait_held(1, 10000) == 1);
    RETURNS(CUDA_ERROR_NOT_READY, cuda.cuStreamQuery(nullptr));
    kvfsim_release();
    OK(cuda.cuStreamSynchronize(nullptr));
    OK(cuda.cuStreamDestroy(blocking));
    OK(cuda.cuMemFree(a));
    OK(cuda.cuMemFree(b));
}

void the_nth_call_fails() {
    Session s;
    CUdeviceptr address = 0;
    CHECK(kvfsim_fail("cuMemAlloc", 2, CUDA_ERROR_OUT_OF_MEMORY, 0) == 0);
    CHECK(kvfsim_fail("cuNothing", 1, 1, 0) == -1);
    OK(cuda.cuMemAlloc(&address, 64));
    OK(cuda.cuMemFree(address));
    RETURNS(CUDA_ERROR_OUT_OF_MEMORY, cuda.cuMemAlloc(&address, 64));
    OK(cuda.cuMemAlloc(&address, 64));
    OK(cuda.cuMemFree(address));
    kvfsim_fail("cuEventCreate", 1, CUDA_ERROR_UNKNOWN, 1);
    CUevent event = nullptr;
    for (int i = 0; i < 3; ++i) RETURNS(CUDA_ERROR_UNKNOWN, cuda.cuEventCreate(&event, 0));
    CHECK(kvfsim_calls("cuEventCreate") == 3);
    CHECK(kvfsim_calls("cuMemAlloc_v2") == 3);
}

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
        RETURNS(CUDA_ERROR_ILLEGAL_ADDRESS, cuda.cuMemFreeHost(host)); // and frees it
        RETURNS(CUDA_ERROR_ILLEGAL_ADDRESS, cuda.cuMemFree(a));
        CHECK(kvfsim_count("sticky_errors") == 1);
    }
    Session next; // a new context works
    CHECK(next.context != old);
    OK(cuda.cuMemFree(allocate(10)));
    RETURNS(CUDA_ERROR_INVALID_CONTEXT, cuda.cuCtxPushCurrent(old));
}

void unmapped_host_memory_is_an_error_not_a_crash() {
    // Large, so that nothing else is mapped to all of the hole.
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

void kernels_check_their_bounds() {
    for (const int wrong : {0, 1, 2, 3}) {
        Session s;
        const CUdeviceptr memory = allocate(1000), staging = allocate(1000);
        auto *table = reinterpret_cast<kvferry_row *>(allocate_host(64));
        Bytes pageable(1000);
        table[0] = {memory + 900, 0, 100};
        if (wrong == 0) table[0].bytes = 101;
        if (wrong == 1) table[0].offset = 901;
        if (wrong == 2) table[0].address = as_device(pageable.data());
        CUmodule module = nullptr;
        CUfunction gather = nullptr;
        OK(cuda.cuModuleLoadData(&module, ptx.c_str()));
        OK(cuda.cuModuleGetFunction(&gather, module, "kvferry_gather"));
        CUdeviceptr staging_argument = staging, rows = as_device(table);
        uint32_t count = wrong == 3 ? 5 : 1; // the table has four
        uint64_t address_distance = 0;
        uint32_t offset_distance = 0;
        uint64_t pitch = 0;
        uint32_t width = 0;
        void *arguments[] = {&staging_argument, &rows,  &count, &address_distance,
                             &offset_distance,  &pitch, &width};
        OK(cuda.cuLaunchKernel(gather, 16, 1, 1, 512, 1, 1, 0, s.stream, arguments, nullptr));
        RETURNS(CUDA_ERROR_ILLEGAL_ADDRESS, cuda.cuStreamSynchronize(s.stream));
        cuda.cuModuleUnload(module);
        cuda.cuMemFreeHost(table);
        cuda.cuMemFree(memory);
        cuda.cuMemFree(staging);
    }
}

void executions_fail_on_request() {
    Session s;
    const CUdeviceptr a = allocate(4096), b = allocate(4096);
    kvfsim_fail("copy", 2, CUDA_ERROR_LAUNCH_FAILED, 0);
    OK(cuda.cuMemcpyDtoDAsync(b, a, 4096, s.stream));
    OK(cuda.cuStreamSynchronize(s.stream));
    OK(cuda.cuMemcpyDtoDAsync(b, a, 4096, s.stream));
    RETURNS(CUDA_ERROR_LAUNCH_FAILED, cuda.cuStreamSynchronize(s.stream));
    RETURNS(CUDA_ERROR_LAUNCH_FAILED, cuda.cuMemFree(a));
    RETURNS(CUDA_ERROR_LAUNCH_FAILED, cuda.cuMemFree(b));
}

void a_lost_device_ends_what_is_queued() {
    for (const bool permanent : {false, true}) {
        {
            Session s;
            const CUdeviceptr a = allocate(4096), b = allocate(4096);
            CUevent event = nullptr;
            OK(cuda.cuEventCreate(&event, CU_EVENT_DISABLE_TIMING));
            kvfsim_hold("copy", 1, 1);
            OK(cuda.cuMemcpyDtoDAsync(b, a, 4096, s.stream));
            OK(cuda.cuEventRecord(event, s.stream));
            std::thread loser([&] {
                CHECK(kvfsim_wait_held(1, 10000) == 1);
                CHECK(kvfsim_lose_device(0, CUDA_ERROR_ECC_UNCORRECTABLE, permanent) == 0);
            });
            RETURNS(CUDA_ERROR_ECC_UNCORRECTABLE, cuda.cuEventSynchronize(event));
            loser.join();
            RETURNS(CUDA_ERROR_ECC_UNCORRECTABLE, cuda.cuEventQuery(event));
            RETURNS(CUDA_ERROR_ECC_UNCORRECTABLE, cuda.cuEventDestroy(event));
            cuda.cuMemFree(a);
            cuda.cuMemFree(b);
        }
        CUcontext context = nullptr;
        RETURNS(permanent ? CUDA_ERROR_ECC_UNCORRECTABLE : CUDA_SUCCESS,
                cuda.cuDevicePrimaryCtxRetain(&context, 0));
        if (!permanent) OK(cuda.cuDevicePrimaryCtxRelease(0));
    }
}

void a_held_copy_ends_with_its_context() {
    CUcontext context = nullptr;
    CUstream stream = nullptr;
    OK(cuda.cuDevicePrimaryCtxRetain(&context, 0));
    OK(cuda.cuCtxPushCurrent(context));
    OK(cuda.cuStreamCreateWithPriority(&stream, CU_STREAM_NON_BLOCKING, 0));
    const CUdeviceptr a = allocate(4096), b = allocate(4096);
    kvfsim_hold("copy", 1, 0);
    OK(cuda.cuMemcpyDtoDAsync(b, a, 4096, stream));
    CHECK(kvfsim_wait_held(1, 10000) == 1);
    OK(cuda.cuCtxPopCurrent(nullptr));
    OK(cuda.cuDevicePrimaryCtxRelease(0));
    CHECK(kvfsim_count("held") == 0);
    CHECK(kvfsim_count("abandoned") == 3); // the stream and both allocations
    RETURNS(CUDA_ERROR_INVALID_HANDLE, cuda.cuStreamQuery(stream));
}

void unsafe_calls_during_a_capture_need_relaxed_mode() {
    Session s;
    CUevent event = nullptr;
    OK(cuda.cuEventCreate(&event, CU_EVENT_DISABLE_TIMING));
    kvfsim_begin_capture();
    RETURNS(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, cuda.cuEventQuery(event));
    CUdeviceptr address = 0;
    RETURNS(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, cuda.cuMemAlloc(&address, 64));
    CHECK(kvfsim_count("capture_violations") == 2);
    std::thread([&] {
        CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
        OK(cuda.cuThreadExchangeStreamCaptureMode(&mode));
        OK(cuda.cuEventQuery(event));
    }).join();
    kvfsim_end_capture();
    OK(cuda.cuEventQuery(event));
    CHECK(kvfsim_count("capture_violations") == 2);
    OK(cuda.cuEventDestroy(event));
}

void a_stream_that_is_captured_executes_nothing() {
    Session s;
    const CUdeviceptr a = allocate(64);
    CUstream stream = nullptr;
    OK(cuda.cuStreamCreateWithPriority(&stream, CU_STREAM_NON_BLOCKING, 0));
    CUstreamCaptureStatus status;
    OK(cuda.cuStreamIsCapturing(stream, &status));
    CHECK(status == CU_STREAM_CAPTURE_STATUS_NONE);
    OK(cuStreamBeginCapture_v2(stream, CU_STREAM_CAPTURE_MODE_GLOBAL));
    OK(cuda.cuStreamIsCapturing(stream, &status));
    CHECK(status == CU_STREAM_CAPTURE_STATUS_ACTIVE);
    unsigned char before[64], after[64];
    CHECK(kvfsim_read(before, a, 64) == 0);
    OK(cuda.cuMemsetD8Async(a, static_cast<unsigned char>(~before[0]), 64, stream));
    CUgraph graph = nullptr;
    OK(cuStreamEndCapture(stream, &graph));
    CHECK(graph != nullptr);
    OK(cuda.cuStreamSynchronize(stream));
    CHECK(kvfsim_read(after, a, 64) == 0);
    CHECK(std::memcmp(before, after, 64) == 0);
    OK(cuda.cuStreamDestroy(stream));
    OK(cuda.cuMemFree(a));
}

void questions_break_a_capture() {
    Session s;
    CUstream stream = nullptr, blocking = nullptr;
    CUevent event = nullptr;
    OK(cuda.cuStreamCreateWithPriority(&stream, CU_STREAM_NON_BLOCKING, 0));
    OK(cuda.cuStreamCreateWithPriority(&blocking, CU_STREAM_DEFAULT, 0));
    OK(cuda.cuEventCreate(&event, CU_EVENT_DISABLE_TIMING));
    const auto broken = [&](CUstream captured) {
        CUgraph graph = nullptr;
        CUstreamCaptureStatus status;
        OK(cuda.cuStreamIsCapturing(captured, &status));
        CHECK(status == CU_STREAM_CAPTURE_STATUS_INVALIDATED);
        RETURNS(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, cuStreamEndCapture(captured, &graph));
        CHECK(graph == nullptr);
    };
    OK(cuStreamBeginCapture_v2(stream, CU_STREAM_CAPTURE_MODE_GLOBAL));
    RETURNS(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, cuda.cuStreamQuery(stream));
    broken(stream);
    OK(cuStreamBeginCapture_v2(stream, CU_STREAM_CAPTURE_MODE_GLOBAL));
    OK(cuda.cuEventRecord(event, stream));
    RETURNS(CUDA_ERROR_CAPTURED_EVENT, cuda.cuEventQuery(event));
    broken(stream);
    // The legacy stream would wait for a blocking one.
    CUstreamCaptureStatus status;
    OK(cuStreamBeginCapture_v2(blocking, CU_STREAM_CAPTURE_MODE_GLOBAL));
    RETURNS(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, cuda.cuStreamIsCapturing(nullptr, &status));
    OK(cuda.cuStreamIsCapturing(blocking, &status));
    CHECK(status == CU_STREAM_CAPTURE_STATUS_ACTIVE);
    RETURNS(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, cuda.cuEventRecord(event, nullptr));
    broken(blocking);
    OK(cuda.cuEventDestroy(event));
    OK(cuda.cuStreamDestroy(stream));
    OK(cuda.cuStreamDestroy(blocking));
}

void time_passes_on_request() {
    Session s;
    const size_t size = 1 << 20;
    const CUdeviceptr a = allocate(size);
    unsigned char *host = allocate_host(size);
    kvfsim_set("bytes_per_second", 50 << 20); // 20 ms each
    CUstream other = nullptr;
    OK(cuda.cuStreamCreateWithPriority(&other, CU_STREAM_NON_BLOCKING, 0));
    const auto start = std::chrono::steady_clock::now();
    OK(cuda.cuMemcpyDtoHAsync(host, a, size / 2, s.stream));
    OK(cuda.cuMemcpyDtoHAsync(host + size / 2, a, size / 2, other)); // they share the link
    OK(cuda.cuStreamSynchronize(s.stream));
    OK(cuda.cuStreamSynchronize(other));
    const auto took = std::chrono::steady_clock::now() - start;
    CHECK(took >= std::chrono::milliseconds(19));
    CHECK(kvfsim_peak_queued(0, KVFSIM_SAVE) == 2);
    CHECK(kvfsim_peak_queued(0, KVFSIM_LOAD) == 0);
    CHECK(kvfsim_count("copies_save") == 2);
    CHECK(kvfsim_count("bytes_save") == size);
    OK(cuda.cuStreamDestroy(other));
    OK(cuda.cuMemFreeHost(host));
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
    OK(cuda.cuMemFreeHost(host)); // waits
    release.join();
    CHECK(kvfsim_count("hazards") == 1);
    OK(cuda.cuMemFree(a));
    CHECK(kvfsim_count("hazards") == 1);
}

void several_devices_are_apart() {
    kvfsim_set("devices", 3);
    int count = 0;
    OK(cuda.cuDeviceGetCount(&count));
    CHECK(count == 3);
    Session zero(0), two(2);
    const CUdeviceptr a = allocate(4096); // of the current one
    int ordinal = -1;
    OK(cuda.cuPointerGetAttribute(&ordinal, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, a));
    CHECK(ordinal == 2);
    RETURNS(CUDA_ERROR_INVALID_CONTEXT, cuda.cuMemsetD8Async(a, 1, 10, zero.stream));
    CHECK(kvfsim_lose_device(0, CUDA_ERROR_UNKNOWN, 0) == 0);
    OK(cuda.cuMemsetD8Async(a, 1, 4096, two.stream));
    OK(cuda.cuStreamSynchronize(two.stream));
    RETURNS(CUDA_ERROR_UNKNOWN, cuda.cuStreamSynchronize(zero.stream));
    unsigned char byte = 0;
    CHECK(kvfsim_read(&byte, a + 4095, 1) == 0 && byte == 1);
    CHECK(kvfsim_read(&byte, a + 4096, 1) == -1);
    OK(cuda.cuMemFree(a));
}

void a_forked_child_has_no_driver() {
    Session s;
    const pid_t child = fork();
    if (child == 0) {
        size_t bytes = 0;
        _exit(cuda.cuInit(0) == CUDA_ERROR_NOT_INITIALIZED &&
                      cuda.cuDeviceTotalMem(&bytes, 0) == CUDA_ERROR_NOT_INITIALIZED
                  ? 0
                  : 1);
    }
    int status = 1;
    waitpid(child, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    OK(cuda.cuStreamSynchronize(s.stream));
}

void the_driver_is_missing_or_old_on_request() {
    kvfsim_set("devices", 0);
    RETURNS(CUDA_ERROR_NO_DEVICE, cuda.cuInit(0));
    kvfsim_set("init_error", CUDA_ERROR_SYSTEM_DRIVER_MISMATCH);
    RETURNS(CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, cuda.cuInit(0));
    kvfsim_set("driver_version", 10010);
    int version = 0;
    OK(cuda.cuDriverGetVersion(&version));
    CHECK(version == 10010);
    setenv("KVFSIM_DEVICES", "2", 1);
    setenv("KVFSIM_FAIL", "cuMemAlloc:1:2,copy:3:700+", 1);
    kvfsim_reset();
    unsetenv("KVFSIM_DEVICES");
    unsetenv("KVFSIM_FAIL");
    OK(cuda.cuInit(0));
    int count = 0;
    OK(cuda.cuDeviceGetCount(&count));
    CHECK(count == 2);
    Session s;
    CUdeviceptr address = 0;
    RETURNS(CUDA_ERROR_OUT_OF_MEMORY, cuda.cuMemAlloc(&address, 64));
}

void run(const char *name, void (*test)()) {
    const int before = failures;
    test();
    std::printf("%s %s\n", failures == before ? "ok  " : "FAIL", name);
    std::fflush(stdout);
}

} // namespace

int main(int argc, char **argv) {
    if (argc < 2) {
        std::printf("usage: test_simulated_cuda gather.ptx [library of a real driver]\n");
        return 2;
    }
    std::ifstream file(argv[1]);
    ptx.assign(std::istreambuf_iterator<char>(file), {});
    const bool simulated = argc < 3;
    Dl_info self{};
    dladdr(reinterpret_cast<void *>(&kvfsim_reset), &self);
    load_api(simulated ? self.dli_fname : argv[2], simulated);
    int version = 0;
    RETURNS(CUDA_ERROR_NOT_INITIALIZED, cuda.cuDeviceGetCount(&version));
    OK(cuda.cuInit(0));

#define RUN(test) run(#test, test)
    RUN(errors_have_names);
    RUN(devices_describe_themselves);
    RUN(calls_need_a_current_context);
    RUN(pointer_attributes_tell_device_from_pinned_and_unknown);
    RUN(a_stream_keeps_its_order);
    RUN(a_stream_waits_for_an_event_of_another);
    RUN(events_tell_the_time_between_them);
    RUN(a_stream_waits_for_a_value_and_writes_one);
    RUN(two_dimensional_copies_respect_pitches);
    RUN(no_copy_spans_two_allocations);
    RUN(copies_of_pageable_memory_are_staged);
    RUN(wrong_arguments_are_refused);
    RUN(kernels_move_regular_rows);
    RUN(kernels_move_rows_of_every_length_and_alignment);
    if (!simulated) return failures != 0;

    const auto leaves_nothing = [] {
        const uint64_t live = kvfsim_count("live");
        if (live)
            std::printf("  %llu objects leaked\n", static_cast<unsigned long long>(live)),
                ++failures;
    };
    leaves_nothing();
    CHECK(kvfsim_count("abandoned") == 0);
    CHECK(kvfsim_count("hazards") == 0);
    CHECK(kvfsim_count("nothing") == UINT64_MAX);
#undef RUN
#define RUN(test) kvfsim_reset(), run(#test, test), leaves_nothing()
    RUN(streams_run_beside_one_another);
    RUN(the_legacy_stream_waits_for_blocking_streams);
    RUN(the_nth_call_fails);
    RUN(memory_is_limited);
    RUN(access_outside_of_an_allocation_is_sticky);
    RUN(unmapped_host_memory_is_an_error_not_a_crash);
    RUN(device_memory_cannot_be_touched_directly);
    RUN(kernels_check_their_bounds);
    RUN(executions_fail_on_request);
    RUN(a_lost_device_ends_what_is_queued);
    RUN(a_held_copy_ends_with_its_context);
    RUN(unsafe_calls_during_a_capture_need_relaxed_mode);
    RUN(a_stream_that_is_captured_executes_nothing);
    RUN(questions_break_a_capture);
    RUN(time_passes_on_request);
    RUN(freeing_memory_in_use_is_noticed);
    RUN(several_devices_are_apart);
    RUN(a_forked_child_has_no_driver);
    RUN(the_driver_is_missing_or_old_on_request);
    return failures != 0;
}
