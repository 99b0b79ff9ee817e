// What makes host memory reachable for the copy engines of devices.
#pragma once

#include <cstdint>

namespace kvf {

// Thread-safe.
class Pinner {
public:
    virtual ~Pinner() = default;
    // Throws KVF_ERR_DEVICE or KVF_ERR_OUT_OF_MEMORY.
    virtual void pin(void *memory, uint64_t bytes) = 0;
    // False where a device may still use the range, and the driver keeps it pinned: the memory must
    // stay mapped.
    virtual bool unpin(void *memory, uint64_t bytes) noexcept = 0;
    // True if the range is pinned, by this library or by anybody else.
    virtual bool is_pinned(const void *memory, uint64_t bytes) const = 0;
};

} // namespace kvf
