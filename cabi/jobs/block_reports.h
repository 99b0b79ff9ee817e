// What a save of blocks tells of each block: a completion as soon as the whole block is in its
// buffer.
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

// The blocks of one job. All memory is allocated before the job starts, so that telling cannot
// fail.
class BlockReports {
public:
    // `sizes`: the bytes of each block. `queue` and `callback` are told; each may be NULL. Throws
    // KVF_ERR_INVALID_HANDLE for a queue that is being destroyed.
    BlockReports(std::vector<uint64_t> sizes, const std::shared_ptr<Queue> &queue,
                 kvf_completion_callback callback);
    BlockReports(const BlockReports &) = delete;
    BlockReports &operator=(const BlockReports &) = delete;

    size_t count() const { return sizes_.size(); }
    uint64_t size(size_t block) const { return sizes_[block]; }

    // Keeps the use of a block's buffer until the block is told of. NULL: its memory is not known.
    // Call this before the job starts.
    void keep(size_t block, std::shared_ptr<MemoryUse> use);
    // A copy that names the buffers did not end. This concerns the blocks that have not been told
    // of.
    void mark_lost();

    // The bytes of this layout will move. Call this before a device gets the layout.
    void expect(const Layout &layout) {
        blocks_[layout.block].left.fetch_add(layout.bytes, std::memory_order_relaxed);
    }
    // So many bytes of the block have moved. Returns true if the block is whole with that: once.
    // Any thread.
    bool moved(size_t block, uint64_t bytes) {
        return blocks_[block].left.fetch_sub(bytes, std::memory_order_acq_rel) == bytes;
    }
    // All layouts of the block are expected. Before that, the block is never whole. Returns as
    // moved().
    bool seal(size_t block) { return moved(block, kSeal); }

    // Tells of a block that is whole. The library no longer uses its buffer. Any thread.
    void tell(size_t block, const kvf_completion &completion, JobOwner &owner);
    // The job ends: nothing will be told of the blocks that were not told of.
    void end() noexcept;

private:
    static constexpr uint64_t kSeal = 1;

    struct Block {
        std::atomic<uint64_t> left{kSeal}; // bytes that have not moved, and kSeal until seal()
        QueueReservation place;
        std::shared_ptr<MemoryUse> use;
    };

    const std::vector<uint64_t> sizes_;
    std::vector<Block> blocks_;
    std::mutex mutex_;    // guards callbacks_ and the uses
    Callbacks callbacks_; // one for each block that has not been told of; none without a callback
};

} // namespace kvf
