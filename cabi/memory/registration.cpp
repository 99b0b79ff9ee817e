#include "memory/registration.h"

#include "core/status.h"
#include "memory/pages.h"
#include "memory/registry.h"

namespace kvf {

void register_memory(void *buffer, uint64_t bytes, std::shared_ptr<Pinner> pinner) {
    if (!buffer || bytes == 0) throw Error(KVF_ERR_INVALID_ARGUMENT, "buffer is NULL or empty");
    auto known = std::make_shared<KnownMemory>();
    known->begin = reinterpret_cast<uint64_t>(buffer);
    known->bytes = bytes;
    if (known->begin + bytes < known->begin)
        throw Error(KVF_ERR_INVALID_ARGUMENT, "range overflows");
    if (!MappedCheck()(known->begin, bytes)) {
        throw Error(KVF_ERR_INVALID_ARGUMENT, "the range is not mapped");
    }
    {
        // Entered first, pinned second: of two threads with overlapping ranges one is refused.
        std::lock_guard lock(registry().mutex);
        if (registry().overlaps(known->begin, bytes)) {
            throw Error(KVF_ERR_BUSY, "overlaps a registered range or a buffer");
        }
        registry().ranges.emplace(known->begin, known);
        if (!pinner) return;
        known->users = 1; // it cannot be unregistered while it is being pinned
    }
    try {
        pinner->pin(buffer, bytes);
    } catch (...) {
        std::lock_guard lock(registry().mutex);
        registry().ranges.erase(known->begin);
        throw;
    }
    std::lock_guard lock(registry().mutex);
    known->pinned = true;
    known->pinner = std::move(pinner);
    known->users.fetch_sub(1, std::memory_order_release);
}

void unregister_memory(void *buffer) {
    auto node = registry().remove(buffer, false);
    KnownMemory &known = *node.mapped();
    if (!known.pinner || known.pinner->unpin(buffer, known.bytes)) return;
    std::lock_guard lock(registry().mutex);
    known.pinned = false; // its owner may unmap it nevertheless: copies avoid it from now on
    registry().ranges.insert(std::move(node));
    throw Error(KVF_ERR_DEVICE_LOST, "a copy did not end, and the driver still has the range");
}

bool is_registered(const void *buffer) {
    std::lock_guard lock(registry().mutex);
    const auto it = registry().ranges.find(reinterpret_cast<uint64_t>(buffer));
    return it != registry().ranges.end() && !it->second->pool;
}

} // namespace kvf
