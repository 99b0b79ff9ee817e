// Ranges of a caller's memory that are registered: pinned where there is something to pin them for.
#pragma once

#include <cstdint>
#include <memory>

#include "memory/pinner.h"

namespace kvf {

// `pinner` may be NULL. Throws KVF_ERR_INVALID_ARGUMENT for a range that is empty or not mapped,
// KVF_ERR_BUSY for one that overlaps known memory, and as Pinner::pin() does.
void register_memory(void *buffer, uint64_t bytes, std::shared_ptr<Pinner> pinner);
// Throws KVF_ERR_INVALID_ARGUMENT if no registered range begins there, KVF_ERR_BUSY while a job in
// flight uses the range, and KVF_ERR_DEVICE_LOST where the range must stay mapped.
void unregister_memory(void *buffer);
// True if a registered range begins there.
bool is_registered(const void *buffer);

} // namespace kvf
