// Streams and events: order, concurrency, and waits for one another.
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>

#include "driver_test.h"

namespace {

// ---- What a real driver does too ----------------------------------------------------------------

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

// ---- What only the simulated driver can show ----------------------------------------------------

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

} // namespace

const std::vector<Test> kAnyDriver = {
    TEST(a_stream_keeps_its_order),
    TEST(a_stream_waits_for_an_event_of_another),
    TEST(events_tell_the_time_between_them),
    TEST(a_stream_waits_for_a_value_and_writes_one),
};
const std::vector<Test> kSimulatedOnly = {
    TEST(streams_run_beside_one_another),
    TEST(the_legacy_stream_waits_for_blocking_streams),
};
