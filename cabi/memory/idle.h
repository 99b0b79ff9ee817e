// How long memory of the library's own stays after its last use.
#pragma once

#include "core/status.h"

namespace kvf {

// Memory that nobody has wanted for so long is returned to the system: half a minute, or
// KVFERRY_IDLE_SECONDS of the environment.
inline uint64_t idle_ns() {
    static const uint64_t value = seconds_from_environment("KVFERRY_IDLE_SECONDS", 30'000'000'000);
    return value;
}

} // namespace kvf
