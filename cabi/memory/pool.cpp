#include "memory/pool.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <iterator>
#include <system_error>

#include "core/status.h"
#include "core/thread.h"
#include "memory/idle.h"
#include "memory/mapping.h"
#include "memory/pages.h"

namespace kvf {

void free_buffer(void *buffer) {
    if (!buffer) return;
    const auto node = registry().remove(buffer, true);
    node.mapped()->pool->release(*node.mapped());
}

uint64_t buffer_capacity(const void *buffer) {
    std::lock_guard lock(registry().mutex);
    const auto it = registry().ranges.find(reinterpret_cast<uint64_t>(buffer));
    if (it == registry().ranges.end() || !it->second->pool) {
        throw Error(KVF_ERR_INVALID_ARGUMENT, "not an allocated buffer");
    }
    return it->second->bytes;
}

Pool::~Pool() {
    {
        std::lock_guard lock(mutex_);
        stopping_ = true;
        freed_.notify_one();
    }
    if (idle_watch_.joinable()) idle_watch_.join();
    unmap(std::move(free_));
}

void *Pool::alloc(uint64_t bytes) {
    if (bytes == 0) throw Error(KVF_ERR_INVALID_ARGUMENT, "bytes is 0");
    if (bytes >= (uint64_t{1} << 46)) throw Error(KVF_ERR_OUT_OF_MEMORY, "no machine has so much");
    // Sizes in steps of a sixteenth at most, so that buffers of nearly the same size serve each
    // other.
    uint64_t step = page_size();
    while (step < bytes / 32) step *= 2;
    uint64_t size = round_up(bytes, step);

    auto known = std::make_shared<KnownMemory>();
    void *memory = take_free(size, known->bytes);
    if (!memory) {
        memory = map(size, round_up(bytes, page_size()));
        known->bytes = size;
    }
    known->begin = reinterpret_cast<uint64_t>(memory);
    known->pinned = pinner_ != nullptr;
    known->pool = shared_from_this();
    std::lock_guard lock(registry().mutex);
    registry().ranges.emplace(known->begin, known);
    return memory;
}

// Takes a free buffer of at least `size`, and sets what it has. NULL where no free buffer is near
// enough to that.
void *Pool::take_free(uint64_t size, uint64_t &bytes) {
    // A larger buffer saves the time to map another. But where bytes are limited, what a buffer
    // takes depends on its size alone.
    const uint64_t most = limit_ ? size : size + size / 4;
    std::lock_guard lock(mutex_);
    const auto it = free_.lower_bound(size);
    if (it == free_.end() || it->first > most) return nullptr;
    void *const memory = it->second.memory;
    bytes = it->first;
    free_bytes_ -= bytes;
    free_.erase(it);
    return memory;
}

void Pool::release(KnownMemory &memory) {
    std::lock_guard lock(mutex_);
    if (memory.lost.load(std::memory_order_relaxed)) {
        lost_ += memory.bytes; // nobody else may have it
        return;
    }
    free_.emplace(memory.bytes, Free{reinterpret_cast<void *>(memory.begin), now_ns()});
    free_bytes_ += memory.bytes;
    try {
        if (!idle_watch_.joinable()) idle_watch_ = start_thread([this] { watch_idle(); });
    } catch (const std::system_error &) {
        // Without a thread the buffer stays until somebody takes it or trims.
    }
    freed_.notify_one();
}

void Pool::watch_idle() {
    name_thread("kvf-pool");
    std::unique_lock lock(mutex_);
    for (;;) {
        freed_.wait(lock, [this] { return stopping_ || !free_.empty(); });
        if (stopping_) return;
        uint64_t oldest = UINT64_MAX;
        for (const auto &[bytes, free] : free_) oldest = std::min(oldest, free.freed_ns);
        const uint64_t now = now_ns();
        if (now < oldest + idle_ns()) {
            // Whatever is freed meanwhile is not older.
            freed_.wait_for(lock, std::chrono::nanoseconds(oldest + idle_ns() - now),
                            [this] { return stopping_; });
            continue;
        }
        lock.unlock();
        trim(now - idle_ns() + 1);
        lock.lock();
    }
}

void *Pool::map(uint64_t &bytes, uint64_t least) {
    try {
        return map_once(bytes, least);
    } catch (const Error &error) {
        // What lies idle may be what the system lacks.
        if (error.status != KVF_ERR_OUT_OF_MEMORY || !trim(UINT64_MAX)) throw;
    }
    return map_once(bytes, least);
}

void *Pool::map_once(uint64_t &bytes, uint64_t least) {
    reserve(bytes, least);
    try {
        return map_and_pin(bytes);
    } catch (...) {
        std::lock_guard lock(mutex_);
        mapped_ -= bytes;
        throw;
    }
}

// Counts memory as mapped that is about to be. Throws KVF_ERR_PINNED_LIMIT where the limit leaves
// no room.
void Pool::reserve(uint64_t &bytes, uint64_t least) {
    FreeBuffers unwanted; // unmapped without the lock
    uint64_t taken;
    bool fits;
    {
        std::lock_guard lock(mutex_);
        // Free buffers of other sizes make room first.
        while (limit_ && mapped_ + bytes > limit_ && !free_.empty()) {
            auto node = free_.extract(std::prev(free_.end()));
            mapped_ -= node.key();
            free_bytes_ -= node.key();
            unwanted.insert(std::move(node));
        }
        if (limit_ && mapped_ + bytes > limit_) bytes = least; // rounding is no reason to refuse
        taken = mapped_;
        fits = !limit_ || mapped_ + bytes <= limit_;
        if (fits) mapped_ += bytes;
    }
    unmap(std::move(unwanted));
    if (!fits) {
        throw Error(KVF_ERR_PINNED_LIMIT, text_of_bytes(taken) + " of " + text_of_bytes(limit_) +
                                              " taken, " + text_of_bytes(bytes) + " wanted");
    }
}

void *Pool::map_and_pin(uint64_t bytes) const {
    const AvailableMemory available = limits_.available();
    // Pinned memory is taken as a whole. Beyond a control group's limit the system kills processes;
    // beyond the machine's memory it swaps first.
    if (pinner_ && bytes > available.group) {
        throw Error(KVF_ERR_OUT_OF_MEMORY, text_of_bytes(available.group_limit - available.group) +
                                               " of the control group's " +
                                               text_of_bytes(available.group_limit) + " taken, " +
                                               text_of_bytes(bytes) + " wanted");
    }
    char *const begin = map_memory(bytes);
    try {
        // A forked child has no use for pinned pages, and copying them on write would take them
        // away from the parent's devices.
        if (pinner_) madvise(begin, bytes, MADV_DONTFORK);
        // The owner of more than there is may not mean to use all of it.
        if (bytes <= available.least()) populate_memory(begin, bytes);
        if (pinner_) pinner_->pin(begin, bytes);
    } catch (...) {
        munmap(begin, bytes);
        throw;
    }
    return begin;
}

// Not under the lock: to unpin takes the driver's time.
void Pool::unmap(FreeBuffers &&buffers) noexcept {
    for (auto &[bytes, free] : buffers) {
        if (!pinner_ || pinner_->unpin(free.memory, bytes)) {
            munmap(free.memory, bytes);
            continue;
        }
        std::lock_guard lock(mutex_);
        mapped_ += bytes;
        lost_ += bytes;
    }
    buffers.clear();
}

bool Pool::trim(uint64_t freed_before_ns) {
    FreeBuffers old;
    {
        std::lock_guard lock(mutex_);
        for (auto it = free_.begin(); it != free_.end();) {
            const auto at = it++;
            if (at->second.freed_ns >= freed_before_ns) continue;
            mapped_ -= at->first;
            free_bytes_ -= at->first;
            old.insert(free_.extract(at));
        }
    }
    const bool any = !old.empty();
    unmap(std::move(old));
    return any;
}

Pool::Usage Pool::usage() const {
    std::lock_guard lock(mutex_);
    return {limit_, mapped_, free_bytes_, lost_};
}

} // namespace kvf
