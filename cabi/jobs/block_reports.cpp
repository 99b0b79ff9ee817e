#include "jobs/block_reports.h"

#include <utility>

namespace kvf {

BlockReports::BlockReports(std::vector<uint64_t> sizes, const std::shared_ptr<Queue> &queue,
                           kvf_completion_callback callback)
    : sizes_(std::move(sizes)), blocks_(sizes_.size()) {
    for (Block &block : blocks_) {
        if (queue) block.place = QueueReservation(queue);
        if (callback) callbacks_.push_back({callback, {}});
    }
}

void BlockReports::keep(size_t block, std::shared_ptr<MemoryUse> use) {
    blocks_[block].use = std::move(use);
}

void BlockReports::mark_lost() {
    std::lock_guard lock(mutex_);
    for (const Block &block : blocks_) {
        if (block.use) block.use->mark_lost();
    }
}

void BlockReports::tell(size_t block, const kvf_completion &completion, JobOwner &owner) {
    Block &told = blocks_[block];
    Callbacks callback;
    {
        std::lock_guard lock(mutex_);
        told.use.reset(); // whoever sees the completion may free the buffer
        if (!callbacks_.empty()) callback.splice(callback.end(), callbacks_, callbacks_.begin());
    }
    if (!callback.empty()) callback.front().completion = completion;
    told.place.push(completion);
    if (!callback.empty()) owner.dispatch(std::move(callback));
}

void BlockReports::end() noexcept {
    std::lock_guard lock(mutex_);
    callbacks_.clear();
    for (Block &block : blocks_) {
        block.place.reset();
        block.use.reset();
    }
}

} // namespace kvf
