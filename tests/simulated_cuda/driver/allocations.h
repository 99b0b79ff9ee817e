// Which memory is allocated on devices, and which host memory is pinned. All functions need the
// mutex, except where a comment says otherwise.
#pragma once

#include "state.h"

namespace simulated {

// Maps a device's memory, unless that has been done.
void open_arena(int device);

// Returns the device memory that an address lies in, or NULL.
Arena *arena_of(uint64_t address);
// Returns where the simulated driver itself can access an address of a device, or NULL. Needs no
// mutex.
std::byte *alias_of(uint64_t address);
// Returns the allocation that an address lies in, or NULL.
const Allocation *allocation_of(uint64_t address);

// Allocates memory on the context's device.
CUresult allocate_device(const ContextPtr &context, uint64_t bytes, uint64_t *address);
// Notes a range of host memory as pinned: `registered` by cuMemHostRegister(), or else allocated by
// cuMemHostAlloc().
CUresult pin(const ContextPtr &context, Range range, bool registered);

// Waits for the operations that name the allocation at `address`, and for what freeing device
// memory waits for; then frees or unregisters the allocation. Unless it is `abandoned` with its
// context, such an operation counts as a hazard.
void release_allocation(Lock &lock, uint64_t address, bool abandoned);
// Frees device memory at once, for cuMemFreeAsync(). An operation of another stream that names the
// memory counts as a hazard.
void free_in_order(uint64_t address);

// Whether the process has memory mapped at all pages of the range. Needs no mutex.
bool is_mapped(Range range);

} // namespace simulated
