// The memory behind addresses that operations name.
#pragma once

#include <vector>

#include "state.h"

namespace simulated {

// The allocations at one moment, for operations that run without the mutex: an allocation that a
// queued operation names is freed only after the operation.
class View {
public:
    // With the mutex.
    View();

    // Each returns where the simulated driver itself can access the bytes, or NULL if they are not
    // all in one allocation (or not mapped, where pageable memory is allowed).

    // Memory of a device; -1: of any device.
    std::byte *device(uint64_t address, uint64_t bytes, int device);
    // Memory that a kernel of the device can reach: its own or pinned host memory.
    std::byte *kernel(uint64_t address, uint64_t bytes, int device);
    // Memory of any device, or any host memory.
    std::byte *any(uint64_t address, uint64_t bytes);

private:
    struct Part {
        Range range;
        // -1: pinned host memory.
        int device;
    };
    const Part *find(uint64_t address, uint64_t bytes);

    // In the order of their addresses.
    std::vector<Part> parts_;
    // What find() returned last.
    const Part *recent_ = nullptr;
};

} // namespace simulated
