// Captures of CUDA graphs: which calls are safe, and which break a capture.
#include <cstring>
#include <thread>

#include "driver_test.h"

namespace {

// ---- What a real driver does too ----------------------------------------------------------------

void a_thread_exchanges_its_capture_mode() {
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    OK(cuda.cuThreadExchangeStreamCaptureMode(&mode));
    CHECK(mode == CU_STREAM_CAPTURE_MODE_GLOBAL);
    OK(cuda.cuThreadExchangeStreamCaptureMode(&mode));
    CHECK(mode == CU_STREAM_CAPTURE_MODE_RELAXED);
}

// ---- What only the simulated driver can show ----------------------------------------------------

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

} // namespace

const std::vector<Test> kAnyDriver = {
    TEST(a_thread_exchanges_its_capture_mode),
};
const std::vector<Test> kSimulatedOnly = {
    TEST(unsafe_calls_during_a_capture_need_relaxed_mode),
    TEST(a_stream_that_is_captured_executes_nothing),
    TEST(questions_break_a_capture),
};
