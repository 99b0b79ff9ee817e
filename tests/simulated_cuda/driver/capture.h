// Streams that are being captured into a graph. All functions need the mutex.
#pragma once

#include "state.h"

namespace simulated {

// The calling thread's mode, which cuThreadExchangeStreamCaptureMode() exchanges.
extern thread_local CUstreamCaptureMode capture_mode;

bool is_captured(const Stream &stream);
// Whether `stream` is the legacy stream and would wait for a stream that is being captured.
bool meets_capture(const Context &context, const Stream &stream);
// A call that a capture does not allow was made: the stream's capture, if there is one, gives no
// graph.
void invalidate_capture(Stream &stream);

// Nobody may ask how far a stream is that is being captured, or an event in it. Each returns an
// error, and invalidates the capture, if there is one.
CUresult refuse_captured(Stream &stream);
CUresult refuse_captured(const Event &event);

} // namespace simulated
