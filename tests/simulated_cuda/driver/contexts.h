// The context that is current on a thread, and broken contexts. All functions need the mutex.
#pragma once

#include "state.h"

namespace simulated {

// Finds the calling thread's current context. Returns its sticky error, CUDA_ERROR_INVALID_CONTEXT
// if none is current, or CUDA_ERROR_CONTEXT_IS_DESTROYED.
CUresult current(ContextPtr *context);

// Gives a context a sticky error, unless it has one: its queued operations end, and its calls
// return the error.
void break_context(Context &context, CUresult error);

} // namespace simulated
