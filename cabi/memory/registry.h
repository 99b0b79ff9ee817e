// Host memory that the library knows: buffers of an engine's pool, and ranges that a caller
// registered. Any other memory may be used too; it is pageable, and nothing is known of it.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "core/status.h"
#include "memory/pinner.h"

namespace kvf {

class Pool;

struct KnownMemory {
    uint64_t begin = 0;
    uint64_t bytes = 0;
    bool pinned = false;
    std::atomic<bool> lost{false};  // a copy that did not end may still touch it
    std::shared_ptr<Pool> pool;     // of a pool buffer
    std::shared_ptr<Pinner> pinner; // of a registered range that is pinned
    std::atomic<uint32_t> users{0}; // jobs in flight
};

// A job's use of the known memory that its buffer lies in. While a use lives, its memory can be
// neither freed nor unregistered.
class MemoryUse {
public:
    explicit MemoryUse(std::shared_ptr<KnownMemory> memory)
        : memory_(std::move(memory)), pinned_(memory_->pinned) {
        memory_->users.fetch_add(1, std::memory_order_relaxed);
    }
    ~MemoryUse() { memory_->users.fetch_sub(1, std::memory_order_release); }
    MemoryUse(const MemoryUse &) = delete;
    MemoryUse &operator=(const MemoryUse &) = delete;

    bool pinned() const { return pinned_; }
    // A copy that names the memory did not end, and may still touch it.
    void mark_lost() { memory_->lost.store(true, std::memory_order_relaxed); }

private:
    std::shared_ptr<KnownMemory> memory_;
    const bool pinned_;
};

// Returns NULL where the range does not lie wholly in known memory.
std::shared_ptr<MemoryUse> use_memory(const void *buffer, uint64_t bytes);

// All known memory of the process by its first address. Ranges do not overlap. A forked child
// begins with none.
struct Registry {
    using Ranges = std::map<uint64_t, std::shared_ptr<KnownMemory>>;
    std::mutex mutex; // of the caller of the functions below, but for remove()
    Ranges ranges;

    Registry();
    // Returns the memory that holds the whole range; NULL if there is none.
    std::shared_ptr<KnownMemory> holding(uint64_t begin, uint64_t bytes) const;
    bool overlaps(uint64_t begin, uint64_t bytes) const;
    // Takes out the memory that begins there: a pool's buffer, or a registered range. Throws
    // KVF_ERR_INVALID_ARGUMENT where no such memory begins, and KVF_ERR_BUSY while a job in flight
    // uses it.
    Ranges::node_type remove(const void *begin, bool of_pool);
};

Registry &registry();

} // namespace kvf
