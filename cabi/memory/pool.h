// The buffers of one engine.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#include "memory/limits.h"
#include "memory/registry.h"

namespace kvf {

// Both throw KVF_ERR_INVALID_ARGUMENT if no buffer of a pool begins there.
// Throws KVF_ERR_BUSY while a job in flight uses the buffer.
void free_buffer(void *buffer);
// Returns the bytes that the buffer takes of its pool.
uint64_t buffer_capacity(const void *buffer);

// Maps buffers, pinned where there is something to pin them for. Keeps them for reuse when they are
// freed. A thread of the pool's returns them to the system when they have been free for idle_ns().
class Pool : public std::enable_shared_from_this<Pool> {
public:
    Pool(uint64_t limit, std::shared_ptr<Pinner> pinner, MemoryLimits limits = MemoryLimits())
        : limit_(limit), pinner_(std::move(pinner)), limits_(std::move(limits)) {}
    ~Pool();

    // Throws KVF_ERR_PINNED_LIMIT, KVF_ERR_OUT_OF_MEMORY, and as Pinner::pin() does.
    void *alloc(uint64_t bytes);
    // Makes a buffer free: somebody else may get it.
    void release(KnownMemory &memory);
    // Returns free buffers that were freed before `freed_before_ns` to the system. False if there
    // were none.
    bool trim(uint64_t freed_before_ns);

    struct Usage {
        uint64_t limit, mapped, free, lost;
    };
    Usage usage() const;

private:
    struct Free {
        void *memory;
        uint64_t freed_ns;
    };
    using FreeBuffers = std::multimap<uint64_t, Free>; // by size
    void *take_free(uint64_t size, uint64_t &bytes);
    // In these `bytes` becomes `least` where the limit leaves no room for more.
    void *map(uint64_t &bytes, uint64_t least);
    void *map_once(uint64_t &bytes, uint64_t least);
    void reserve(uint64_t &bytes, uint64_t least);
    void *map_and_pin(uint64_t bytes) const;
    void unmap(FreeBuffers &&buffers) noexcept;
    void watch_idle();

    const uint64_t limit_; // 0: none
    const std::shared_ptr<Pinner> pinner_;
    const MemoryLimits limits_;
    mutable std::mutex mutex_;
    FreeBuffers free_;
    uint64_t mapped_ = 0;
    uint64_t free_bytes_ = 0;
    uint64_t lost_ = 0; // mapped for ever: a device that was given up may still touch them
    std::condition_variable freed_;
    bool stopping_ = false;
    std::thread idle_watch_; // started with the first buffer that is freed
};

} // namespace kvf
