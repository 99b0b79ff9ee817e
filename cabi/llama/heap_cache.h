// Heap memory that libllama allocates while it serialises, kept from one recording to the next.
//
// libllama lists every fragment before it moves one: 16 MiB for half a million, grown by doubling.
// On a thread that is not the main one, glibc returns so large allocations to the system at once,
// and the next ones cost 8,000 page faults: recording 524,288 fragments took 35 ms of processor
// time instead of 9 (measured on this project's development machine, 2 cores).
#pragma once

#include <algorithm>
#include <cstddef>
#include <new>
#include <vector>

namespace kvf {

// Belongs to one context, whose thread alone records. So it has no lock.
class HeapCache {
public:
    static constexpr size_t kLeastBytes = 256 << 10; // of an allocation that is kept
    static constexpr size_t kMostBytes = 64 << 20;   // of all that are kept

    HeapCache() = default;
    ~HeapCache() {
        while (!kept_.empty()) free_oldest();
    }
    HeapCache(const HeapCache &) = delete;
    HeapCache &operator=(const HeapCache &) = delete;

    // Returns NULL where no memory of exactly this size is kept. The caller will name that size
    // when it frees the memory, and allocators trust it.
    void *take(size_t bytes) {
        const auto found = std::find_if(kept_.begin(), kept_.end(), [&](const Allocation &each) {
            return each.bytes == bytes;
        });
        if (found == kept_.end()) return nullptr;
        void *const memory = found->memory;
        kept_.erase(found);
        kept_bytes_ -= bytes;
        return memory;
    }

    // Keeps memory of operator new, and frees older memory where there is no room for all. Returns
    // false if it does not keep the memory.
    bool keep(void *memory, size_t bytes) noexcept {
        if (bytes > kMostBytes) return false;
        try {
            kept_.push_back({memory, bytes});
        } catch (const std::bad_alloc &) {
            return false;
        }
        kept_bytes_ += bytes;
        while (kept_bytes_ > kMostBytes) free_oldest();
        return true;
    }

private:
    struct Allocation {
        void *memory;
        size_t bytes;
    };
    void free_oldest() noexcept {
        const Allocation oldest = kept_.front();
        kept_.erase(kept_.begin());
        kept_bytes_ -= oldest.bytes;
        ::operator delete(oldest.memory, oldest.bytes);
    }

    std::vector<Allocation> kept_; // the oldest first
    size_t kept_bytes_ = 0;
};

} // namespace kvf
