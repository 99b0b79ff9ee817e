// What a job of blocks tells of each of them: a completion when the whole block is in its buffer.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "jobs/owner.h"
#include "jobs/queue.h"
#include "memory/layout.h"
#include "memory/registry.h"

namespace kvf {

// Everything that telling needs is taken before the job starts, so that telling cannot fail.
class BlockReports {
public:
    // `queue` or `callback` may be NULL. Throws KVF_ERR_INVALID_HANDLE for a queue that is being
    // destroyed.
    BlockReports(std::vector<uint64_t> sizes, const std::shared_ptr<Queue> &queue,
                 kvf_completion_callback callback);
    BlockReports(const BlockReports &) = delete;
    BlockReports &operator=(const BlockReports &) = delete;

    size_t count() const { return sizes_.size(); }
    uint64_t size(size_t block) const { return sizes_[block]; }

    // Before the job starts: what the buffer of the block lies in, until the block is told of.
    // NULL: in no known memory.
    void keep(size_t block, std::shared_ptr<MemoryUse> memory);
    // A copy that names the buffers did not end. Concerns the blocks that have not been told of.
    void mark_lost();

    // The bytes of this layout will move: before they do. Blocks are not whole before seal().
    void expect(const Layout &layout) {
        blocks_[layout.block].left.fetch_add(layout.bytes, std::memory_order_relaxed);
    }
    // So many bytes of the block have moved. True once: the block is whole. Any thread.
    bool moved(size_t block, uint64_t bytes) {
        return blocks_[block].left.fetch_sub(bytes, std::memory_order_acq_rel) == bytes;
    }
    // No layout of the block will follow. True if the block is whole.
    bool seal(size_t block) { return moved(block, kSeal); }

    // Tells of a block that is whole, after the library is done with its buffer. Any thread.
    void tell(size_t block, const kvf_completion &completion, JobOwner &owner);
    // The job ends: blocks that were not told of never will be.
    void end() noexcept;

private:
    static constexpr uint64_t kSeal = 1;

    struct Block {
        // Bytes that have not moved, and one more until seal().
        std::atomic<uint64_t> left{kSeal};
        QueueReservation queue;
        std::shared_ptr<MemoryUse> memory;
    };

    const std::vector<uint64_t> sizes_;
    std::vector<Block> blocks_;
    std::mutex mutex_; // guards the blocks' memory, and what follows
    Callbacks callbacks_;
};

} // namespace kvf
