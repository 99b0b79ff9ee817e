// Which allocation of which device a pointer lies in.
#pragma once

#include <cstdint>
#include <optional>

#include "cuda/context.h"

namespace kvf {

struct CudaAllocation {
    int ordinal;         // of the device
    uint64_t begin, end; // as far as the driver tells
    // All of it is memory, as cuMemAlloc gives it: memory that can be shared with another process
    // by the old interface is such. Otherwise it may be addresses that were reserved for cuMemMap,
    // and nothing is behind some of them.
    bool in_one_piece;
};

// Returns nothing for memory that is not a device's. Throws where the driver does not tell.
std::optional<CudaAllocation> find_allocation(const CudaContext &context, uint64_t address);

} // namespace kvf
