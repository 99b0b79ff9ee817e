// Checks of the buffer that a caller gives for a transfer.
#pragma once

#include "memory/layout.h"

namespace kvf {

// Throws KVF_ERR_BUFFER_TOO_SMALL if fewer bytes were given than are needed.
void check_room(uint64_t needed, uint64_t given);

// Throws KVF_ERR_INVALID_ARGUMENT if the buffer of a load cannot be read, or that of a save cannot
// be written: a thread would crash there. Probes the pages that the buffer begins and ends in.
void check_accessible(Direction direction, const void *buffer, uint64_t bytes);

} // namespace kvf
