// The completions of single blocks: a save of blocks reports each block as soon as the whole block
// is in its buffer.
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

// The blocks of one job. All memory is allocated before the job starts, so that a report cannot
// fail.
class BlockReports {
public:
    // `sizes` has the bytes of each block. `queue` and `callback` get the completions; each may be
    // NULL. Throws KVF_ERR_INVALID_HANDLE if the queue is being destroyed.
    BlockReports(std::vector<uint64_t> sizes, const std::shared_ptr<Queue> &queue,
                 kvf_completion_callback callback);
    BlockReports(const BlockReports &) = delete;
    BlockReports &operator=(const BlockReports &) = delete;

    size_t count() const { return sizes_.size(); }
    uint64_t size(size_t block) const { return sizes_[block]; }

    // Keeps the use of a block's buffer until the block has been reported. `use` is NULL if the
    // library does not know that memory. Call this before the job starts.
    void keep(size_t block, std::shared_ptr<MemoryUse> use);
    // A copy that names the buffers did not end. Marks the buffers of all blocks that have not been
    // reported.
    void mark_lost();

    // The bytes of this layout will move. Call this before a device gets the layout.
    void expect(const Layout &layout) {
        blocks_[layout.block].left.fetch_add(layout.bytes, std::memory_order_relaxed);
    }
    // Counts bytes of the block that have moved. Returns true, once, when the whole block has
    // moved. Any thread.
    bool moved(size_t block, uint64_t bytes) {
        return blocks_[block].left.fetch_sub(bytes, std::memory_order_acq_rel) == bytes;
    }
    // Call this when all layouts of the block are expected. Before that, the block is never whole.
    // Returns as moved().
    bool seal(size_t block) { return moved(block, kSeal); }

    // Reports a whole block. The library no longer uses the block's buffer. Any thread.
    void tell(size_t block, const kvf_completion &completion, JobOwner &owner);
    // The job ends. Blocks that have not been reported never will be.
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
    std::mutex mutex_; // guards callbacks_ and the uses
    // One for each block that has not been reported; empty without a callback.
    Callbacks callbacks_;
};

} // namespace kvf
