#include "memory/registry.h"

#include <new>

#include "core/fork.h"

namespace kvf {

Registry::Registry() {
    // The child forgets the parent's memory. Threads that the child does not have may hold the
    // locks of its pools; and where pinned memory was, the child has nothing, or soon something
    // else.
    on_fork([this] { mutex.lock(); }, [this] { mutex.unlock(); },
            [this] {
                new (&ranges) Ranges;
                mutex.unlock();
            });
}

std::shared_ptr<KnownMemory> Registry::holding(uint64_t begin, uint64_t bytes) const {
    auto it = ranges.upper_bound(begin);
    if (it == ranges.begin()) return nullptr;
    const auto &known = (--it)->second;
    return begin + bytes <= known->begin + known->bytes ? known : nullptr;
}

bool Registry::overlaps(uint64_t begin, uint64_t bytes) const {
    auto it = ranges.lower_bound(begin);
    if (it != ranges.end() && it->first < begin + bytes) return true;
    if (it == ranges.begin()) return false;
    --it;
    return it->first + it->second->bytes > begin;
}

Registry::Ranges::node_type Registry::remove(const void *begin, bool of_pool) {
    std::lock_guard lock(mutex);
    auto it = ranges.find(reinterpret_cast<uint64_t>(begin));
    if (it == ranges.end() || (it->second->pool != nullptr) != of_pool) {
        throw Error(KVF_ERR_INVALID_ARGUMENT,
                    of_pool ? "not an allocated buffer; has it been freed before?"
                            : "not the start of a registered range");
    }
    if (it->second->users.load(std::memory_order_acquire)) {
        throw Error(KVF_ERR_BUSY, "a job in flight uses the buffer");
    }
    return ranges.extract(it);
}

Registry &registry() {
    // Never destroyed: jobs may outlive static destructors.
    static Registry *registry = new Registry;
    return *registry;
}

std::shared_ptr<MemoryUse> use_memory(const void *buffer, uint64_t bytes) {
    std::lock_guard lock(registry().mutex);
    auto known = registry().holding(reinterpret_cast<uint64_t>(buffer), bytes);
    return known ? std::make_shared<MemoryUse>(std::move(known)) : nullptr;
}

} // namespace kvf
