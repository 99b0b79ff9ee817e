// Faults on request: calls and executions that fail, lost devices, held copies.
#include <thread>

#include "driver_test.h"

namespace {

// ---- What only the simulated driver can show ----------------------------------------------------

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

} // namespace

const std::vector<Test> kAnyDriver = {};
const std::vector<Test> kSimulatedOnly = {
    TEST(the_nth_call_fails),
    TEST(executions_fail_on_request),
    TEST(a_lost_device_ends_what_is_queued),
    TEST(a_held_copy_ends_with_its_context),
};
