// Faults, holds and lost devices, as tests ask for them.
#pragma once

#include "state.h"

namespace simulated {

// Replaces all rules by those of the environment. With the mutex.
void read_rules(Driver &d);

// Counts one occasion of `what`, which may also be called `alias`. Returns the error of a rule that
// applies to this occasion, or CUDA_SUCCESS. With the mutex.
CUresult injected_error(const char *what, const char *alias);

// Counts one occasion of `what`. Returns true if this occasion is to be held. With the mutex.
bool injected_hold(const char *what);

} // namespace simulated
