// Anonymous memory from the system for large buffers.
#pragma once

#include <cstdint>

namespace kvf {

// Maps `bytes`, a multiple of the page size; munmap() unmaps them. Large memory begins at a huge
// page. Throws KVF_ERR_OUT_OF_MEMORY.
char *map_memory(uint64_t bytes);

// Takes the pages of new memory now, by several threads where they are many. The first transfer
// would pay for them otherwise, and the driver pins memory that is there ten times as fast (32 ms
// against 374 ms for 1 GiB beside an H200).
void populate_memory(char *begin, uint64_t bytes);

} // namespace kvf
