// What the simulated driver counts.
#pragma once

#include "state.h"

namespace simulated {

// Counters start anew, except those that tell what is there now: objects, memory, held operations.
// With the mutex.
void reset_counters();

} // namespace simulated
