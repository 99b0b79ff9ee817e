// Streams that are being captured into a CUDA graph: they execute nothing, and some calls break the
// capture. Also what kvfsim_begin_capture() simulates: a capture by another thread.
#include "capture.h"

#include <algorithm>
#include <utility>

#include "entry.h"
#include "streams.h"

namespace simulated {

thread_local CUstreamCaptureMode capture_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

bool is_captured(const Stream &stream) { return stream.capture != CU_STREAM_CAPTURE_STATUS_NONE; }

void invalidate_capture(Stream &stream) {
    if (is_captured(stream)) stream.capture = CU_STREAM_CAPTURE_STATUS_INVALIDATED;
}

bool meets_capture(const Context &context, const Stream &stream) {
    return &stream == context.legacy.get() &&
           std::any_of(context.streams.begin(), context.streams.end(), [](const StreamPtr &other) {
               return other->blocking && is_captured(*other);
           });
}

CUresult refuse_captured(Stream &stream) {
    if (!is_captured(stream)) return CUDA_SUCCESS;
    invalidate_capture(stream);
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

CUresult refuse_captured(const Event &event) {
    if (!event.captured) return CUDA_SUCCESS;
    invalidate_capture(*event.captured);
    return CUDA_ERROR_CAPTURED_EVENT;
}

} // namespace simulated

using namespace simulated;

extern "C" {

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    ENTER(cuStreamIsCapturing);
    if (!status) return CUDA_ERROR_INVALID_VALUE;
    Lock lock(driver().mutex);
    StreamPtr found;
    if (CUresult error = find_stream(stream, &found)) return error;
    if (meets_capture(*found->context, *found)) return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    *status = found->capture;
    return CUDA_SUCCESS;
}

CUresult cuStreamBeginCapture_v2(CUstream stream, CUstreamCaptureMode) {
    Lock lock(driver().mutex);
    StreamPtr found;
    if (CUresult error = find_stream(stream, &found)) return error;
    if (found == found->context->legacy || is_captured(*found))
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    found->capture = CU_STREAM_CAPTURE_STATUS_ACTIVE;
    return CUDA_SUCCESS;
}

CUresult cuStreamEndCapture(CUstream stream, CUgraph *graph) {
    Lock lock(driver().mutex);
    StreamPtr found;
    if (CUresult error = find_stream(stream, &found)) return error;
    if (!graph || !is_captured(*found)) return CUDA_ERROR_INVALID_VALUE;
    const bool whole = found->capture == CU_STREAM_CAPTURE_STATUS_ACTIVE;
    found->capture = CU_STREAM_CAPTURE_STATUS_NONE;
    *graph = whole ? new_handle<CUgraph>() : nullptr;
    return whole ? CUDA_SUCCESS : CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *mode) {
    ENTER(cuThreadExchangeStreamCaptureMode);
    if (!mode || *mode > CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_ERROR_INVALID_VALUE;
    std::swap(*mode, capture_mode);
    return CUDA_SUCCESS;
}

void kvfsim_begin_capture(void) { driver().capturing = true; }
void kvfsim_end_capture(void) { driver().capturing = false; }

} // extern "C"
