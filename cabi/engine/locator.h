// Finds which device an address belongs to.
#pragma once

#include "cuda/allocation.h"
#include "jobs/device.h"
#include "memory/pages.h"

namespace kvf {

// Where a range of memory lies.
struct Location {
    uint32_t device; // its index
    // Ranges that follow one another in a list must not be joined where this differs: one copy may
    // not span both. Of the host's memory it is always the same.
    uint64_t allocation;
};

// Made for one submission. Remembers where it last looked, so that half a million regions of a few
// tensors cost a few questions to the driver.
class Locator {
public:
    // `contexts`: of the devices after the host, in the order of their indices. Must outlive the
    // locator.
    explicit Locator(const CudaContexts &contexts) : contexts_(contexts) {}
    // Throws KVF_ERR_UNREACHABLE.
    Location operator()(uint64_t address, uint64_t bytes);

private:
    bool on_cuda(uint64_t address, uint32_t &device);
    uint64_t allocation_of(uint64_t address, uint64_t bytes);

    const CudaContexts &contexts_;
    MappedCheck mapped_;
    CudaAllocation known_{}; // of the device below
    uint32_t known_device_ = 0;
    uint64_t neighbours_begin_ = 0, neighbours_end_ = 0; // ranges without a gap between them
};

} // namespace kvf
