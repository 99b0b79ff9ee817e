// Which allocation of which device a pointer lies in.
#pragma once

#include <cstdint>
#include <optional>

#include "cuda/context.h"

namespace kvf {

struct CudaAllocation {
    int ordinal;         // of the device
    uint64_t begin, end; // as far as the driver tells
    // Whether there is memory behind every address, as there is after cuMemAlloc. (The driver tells
    // it indirectly: such memory can be shared with other processes by legacy IPC.) Otherwise the
    // addresses may have been reserved for cuMemMap, with memory behind only some of them.
    bool in_one_piece;
};

// Returns nothing for memory that is not a device's. Throws if the driver does not tell.
std::optional<CudaAllocation> find_allocation(const CudaContext &context, uint64_t address);

} // namespace kvf
