// Large blocks that libllama allocates while it serialises, kept from one recording to the next.
//
// It lists every fragment before it moves one: 16 MiB for half a million, grown by doubling. On a thread
// that is not the main one, glibc returns such blocks to the system at once, and taking them again costs
// 8,000 page faults: recording 524,288 fragments took 35 ms of processor time instead of 9 (measured on
// this project's development machine, 2 cores).
#pragma once

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
        for (const Block &block : blocks_) ::operator delete(block.memory);
    }
    BlockCache(const BlockCache &) = delete;
    BlockCache &operator=(const BlockCache &) = delete;

    // NULL where there is none of about this size.
    void *take(size_t bytes) {
        for (Block &block : blocks_) {
            if (block.bytes < bytes || block.bytes > bytes + bytes / 4) continue;
            void *memory = block.memory;
            kept_ -= block.bytes;
            block = blocks_.back();
            blocks_.pop_back();
            return memory;
        }
        return nullptr;
    }

    // Keeps a block of operator new; false if it does not want to. Does not throw.
    bool keep(void *memory, size_t bytes) noexcept {
        if (kept_ + bytes > kMostBytes) return false;
        try {
            blocks_.push_back({memory, bytes});
        } catch (const std::bad_alloc &) {
            return false;
        }
        kept_ += bytes;
        return true;
    }

private:
    struct Block {
        void *memory;
        size_t bytes;
    };
    std::vector<Block> blocks_;
    size_t kept_ = 0;
};

} // namespace kvf
