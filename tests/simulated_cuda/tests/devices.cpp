// The driver, its devices and their contexts.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "driver_test.h"

namespace {

// ---- What a real driver does too ----------------------------------------------------------------

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
    // These calls find the context by the stream or the event.
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

// ---- What only the simulated driver can show ----------------------------------------------------

void several_devices_are_apart() {
    kvfsim_set("devices", 3);
    int count = 0;
    OK(cuda.cuDeviceGetCount(&count));
    CHECK(count == 3);
    Session zero(0), two(2);
    const CUdeviceptr a = allocate(4096); // on the current context's device
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

} // namespace

const std::vector<Test> kAnyDriver = {
    TEST(errors_have_names),
    TEST(devices_describe_themselves),
    TEST(calls_need_a_current_context),
};
const std::vector<Test> kSimulatedOnly = {
    TEST(several_devices_are_apart),
    TEST(a_forked_child_has_no_driver),
    TEST(the_driver_is_missing_or_old_on_request),
};
