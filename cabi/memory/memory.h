// Host memory that the library knows: buffers of an engine's pool, and ranges that a caller registered.
// Any other memory may be used too; it is pageable, and nothing is known of it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#include "core/status.h"
#include "memory/limits.h"

namespace kvf {

// Makes host memory reachable for the copy engines of devices. Thread-safe.
class Pinner {
public:
    virtual ~Pinner() = default;
    // Throws KVF_ERR_DEVICE or KVF_ERR_OUT_OF_MEMORY.
    virtual void pin(void *memory, uint64_t bytes) = 0;
    // False where the driver could not be asked to: it still has the range, and so may a device. Then the memory must
    // stay mapped.
    virtual bool unpin(void *memory, uint64_t bytes) noexcept = 0;
    // Somebody, not necessarily this library, has pinned the range.
    virtual bool is_pinned(const void *memory, uint64_t bytes) const = 0;
};

// Memory of the library's own that nobody has wanted for so long goes back to the system: half a minute, or
// KVFERRY_IDLE_SECONDS of the environment.
uint64_t idle_ns();

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

// A job's claim on the known memory that its buffer lies in: while it lives, the memory can be neither
// freed nor unregistered.
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
    // A copy that names it did not end, and may at any time.
    void mark_lost() { memory_->lost.store(true, std::memory_order_relaxed); }

private:
    std::shared_ptr<KnownMemory> memory_;
    const bool pinned_;
};

// NULL where the range does not lie wholly in known memory.
std::shared_ptr<MemoryUse> use_memory(const void *buffer, uint64_t bytes);

void register_memory(void *buffer, uint64_t bytes, std::shared_ptr<Pinner> pinner);
void unregister_memory(void *buffer);
// A registered range begins there.
bool is_registered(const void *buffer);
void free_buffer(void *buffer);
// What a buffer takes of its pool.
uint64_t buffer_capacity(const void *buffer);

// The buffers of one engine: mapped memory, pinned where there is something to pin it for, kept for
// reuse when it is freed, and returned to the system when it has lain idle, by a thread of the pool's.
class Pool : public std::enable_shared_from_this<Pool> {
public:
    Pool(uint64_t limit, std::shared_ptr<Pinner> pinner, MemoryLimits limits = MemoryLimits())
        : limit_(limit), pinner_(std::move(pinner)), limits_(std::move(limits)) {}
    ~Pool();

    void *alloc(uint64_t bytes);
    void take_back(KnownMemory &memory);
    // Returns free buffers that were freed before `freed_before_ns` to the system. False if there were none.
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
    // `bytes` becomes `least` where the limit leaves no room for more.
    void *map(uint64_t &bytes, uint64_t least);
    void *map_pinned(uint64_t &bytes, uint64_t least);
    void unmap(FreeBuffers &&buffers) noexcept;
    void watch_idle();

    const uint64_t limit_; // 0: none
    const std::shared_ptr<Pinner> pinner_;
    const MemoryLimits limits_;
    mutable std::mutex mutex_;
    FreeBuffers free_;
    uint64_t mapped_ = 0;
    uint64_t free_bytes_ = 0;
    uint64_t lost_ =
        0; // of what is mapped, for ever: a device that was given up may still touch it
    std::condition_variable freed_;
    bool stopping_ = false;
    std::thread idle_watch_; // started with the first buffer that is freed
};

// Whether memory may be written: looks at the pages that ranges begin and end in, and remembers the last ones.
class WritableCheck {
public:
    bool operator()(uint64_t address, uint64_t bytes);

private:
    bool is_writable(uint64_t address);
    uint64_t last_begin_ = 0, last_end_ = 0; // pages that may be written
};

// Whether memory may be read: asks the system about single pages at first, and reads the list of all mappings when
// there are many questions.
class MappedCheck {
public:
    // False where the page that [address, address + bytes) begins or ends in is not mapped, or without access.
    bool operator()(uint64_t address, uint64_t bytes);

private:
    bool is_accessible(uint64_t page);
    void read_mappings();
    bool is_in_mappings(uint64_t page);

    uint64_t known_begin_ = 0, known_end_ = 0; // that may be read: where the last answer came from
    uint64_t questions_ = 0;
    std::map<uint64_t, uint64_t> mappings_; // begin, end
};

} // namespace kvf
