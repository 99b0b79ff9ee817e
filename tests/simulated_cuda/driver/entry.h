// How every entry point begins. Files that define entry points include this.
#pragma once

#include "state.h"

// Declares all entry points, so that a definition that differs from the table does not compile.
#define KVFSIM_DECLARE(name, symbol, parameters)                                                   \
    extern "C" __attribute__((visibility("default"))) CUresult symbol parameters;
CUDA_DRIVER_ENTRY_POINTS(KVFSIM_DECLARE)
#undef KVFSIM_DECLARE

namespace simulated {

// Returns the number of an entry point, which may be named as in cuda.h or by its symbol; -1: there
// is none.
int find_entry_point(const char *name);

// Counts the call. Returns the error that the call must return at once, or CUDA_SUCCESS.
CUresult enter(EntryPoint entry_point, bool needs_init, bool unsafe_in_capture);

} // namespace simulated

// The first statement of an entry point.
#define ENTER(symbol)                                                                              \
    if (CUresult error = simulated::enter(simulated::k_##symbol, true, false)) return error
// Of one that a thread must not call while another thread captures a graph in global mode.
#define ENTER_UNSAFE(symbol)                                                                       \
    if (CUresult error = simulated::enter(simulated::k_##symbol, true, true)) return error
// Of one that works before cuInit().
#define ENTER_EARLY(symbol)                                                                        \
    if (CUresult error = simulated::enter(simulated::k_##symbol, false, false)) return error
