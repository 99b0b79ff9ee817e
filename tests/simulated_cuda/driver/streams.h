// Streams by their handles. All functions need the mutex, and return the sticky error of the
// stream's context.
#pragma once

#include "state.h"

namespace simulated {

// Finds a stream of any context. NULL, CU_STREAM_LEGACY and CU_STREAM_PER_THREAD all mean the
// legacy stream of the current context.
CUresult find_stream(CUstream handle, StreamPtr *stream);

// As find_stream(), for a stream that must be of the current context: returns
// CUDA_ERROR_INVALID_CONTEXT if it is of another one.
CUresult find_current_stream(CUstream handle, StreamPtr *stream);

} // namespace simulated
