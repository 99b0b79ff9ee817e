// Copies: pitches, borders of allocations, pageable memory, and the time that copies take.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "driver_test.h"

namespace {

// ---- What a real driver does too ----------------------------------------------------------------

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
            // Some rows before the border, others behind it, and no row across it.
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
        std::fill(content.begin(), content.end(), 0); // the call has read all of it
        Bytes back(size);
        OK(cuda.cuMemcpyDtoHAsync(back.data(), device, size, s.stream));
        CHECK(back == before); // the call has written all of it
    }
    OK(cuda.cuMemFree(device));
}

// ---- What only the simulated driver can show ----------------------------------------------------

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

} // namespace

const std::vector<Test> kAnyDriver = {
    TEST(two_dimensional_copies_respect_pitches),
    TEST(no_copy_spans_two_allocations),
    TEST(copies_of_pageable_memory_are_staged),
};
const std::vector<Test> kSimulatedOnly = {
    TEST(time_passes_on_request),
};
