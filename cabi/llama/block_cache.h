// Large blocks that libllama allocates while it serialises, kept from one recording to the next.
//
// It lists every fragment before it moves one: 16 MiB for half a million, grown by doubling. On a
// thread that is not the main one, glibc returns such blocks to the system at once, and taking them
// again costs 8,000 page faults: recording 524,288 fragments took 35 ms of processor time instead
// of 9 (measured on this project's development machine, 2 cores).
#pragma once

#include <algorithm>
#include <cstddef>
#include <new>
#include <vector>

namespace kvf {

// Not locked: it belongs to one context, whose thread alone records.
class BlockCache {
public:
    static constexpr size_t kLeastBlock = 256 << 10;
    static constexpr size_t kMostBytes = 64 << 20; // kept in all

    BlockCache() = default;
    ~BlockCache() {
        while (!blocks_.empty()) free_oldest();
    }
    BlockCache(const BlockCache &) = delete;
    BlockCache &operator=(const BlockCache &) = delete;

    // NULL where there is none of exactly this size: whoever frees a block names the size that it
    // asked for, and allocators trust that.
    void *take(size_t bytes) {
        const auto block = std::find_if(blocks_.begin(), blocks_.end(),
                                        [&](const Block &each) { return each.bytes == bytes; });
        if (block == blocks_.end()) return nullptr;
        void *const memory = block->memory;
        blocks_.erase(block);
        kept_ -= bytes;
        return memory;
    }

    // Keeps a block of operator new, instead of older ones where there is no room for all; false if
    // it does not want to. Does not throw.
    bool keep(void *memory, size_t bytes) noexcept {
        if (bytes > kMostBytes) return false;
        try {
            blocks_.push_back({memory, bytes});
        } catch (const std::bad_alloc &) {
            return false;
        }
        kept_ += bytes;
        while (kept_ > kMostBytes) free_oldest();
        return true;
    }

private:
    struct Block {
        void *memory;
        size_t bytes;
    };
    void free_oldest() noexcept {
        const Block oldest = blocks_.front();
        blocks_.erase(blocks_.begin());
        kept_ -= oldest.bytes;
        ::operator delete(oldest.memory, oldest.bytes);
    }

    std::vector<Block> blocks_; // the oldest first
    size_t kept_ = 0;
};

} // namespace kvf
