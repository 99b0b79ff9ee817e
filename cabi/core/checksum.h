// XXH64, the 64-bit hash of the xxHash family with seed 0, as its specification describes it
// (doc/xxhash_spec.md of xxHash). Not cryptographic: it finds damage, not forgery.
#pragma once

#include <cstdint>

namespace kvf {

uint64_t checksum(const void *data, uint64_t bytes);

} // namespace kvf
