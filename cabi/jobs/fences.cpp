#include "jobs/fences.h"

#include <algorithm>
#include <new>
#include <set>

#include "core/fork.h"

namespace kvf {

// All fences of the process.
struct FenceLine {
    std::mutex mutex;
    std::condition_variable lowered;
    std::set<const Fence *> fences;

    static FenceLine &get() {
        static FenceLine *line = [] {
            auto *made = new FenceLine;
            // In a forked child the transfers are the parent's, and will never end.
            on_fork([made] { made->mutex.lock(); }, [made] { made->mutex.unlock(); },
                    [made] {
                        // It still counts the parent's threads that waited, and would wait for them.
                        new (&made->lowered) std::condition_variable;
                        made->fences.clear();
                        Fence::count_ = 0;
                        Fence::close_count_ = 0;
                        made->mutex.unlock();
                    });
            return made;
        }();
        return *line;
    }

    void note_counts() {
        const auto close = std::count_if(fences.begin(), fences.end(),
                                         [](const Fence *fence) { return fence->close_; });
        Fence::count_.store(static_cast<uint32_t>(fences.size()), std::memory_order_release);
        Fence::close_count_.store(static_cast<uint32_t>(close), std::memory_order_release);
    }

    bool stands_in_the_way(MemoryRange range, Access access) const {
        return std::any_of(fences.begin(), fences.end(), [&](const Fence *fence) {
            if (access == Access::Read && fence->direction_ == Direction::Save) return false;
            if (access == Access::WriteRows && !fence->close_) return false;
            const auto &ranges = fence->ranges_;
            const auto after = std::upper_bound(
                ranges.begin(), ranges.end(), range.begin,
                [](uint64_t begin, const MemoryRange &other) { return begin < other.end; });
            return after != ranges.end() && after->begin < range.end;
        });
    }
};

void Fence::raise(std::vector<MemoryRange> ranges, bool close) {
    if (ranges.empty()) return;
    FenceLine &line = FenceLine::get();
    std::lock_guard lock(line.mutex);
    ranges_ = std::move(ranges);
    line.fences.insert(this);
    standing_ = true;
    close_ = close;
    line.note_counts();
}

void Fence::lower() noexcept {
    FenceLine &line = FenceLine::get();
    std::lock_guard lock(line.mutex);
    if (!standing_) return;
    standing_ = false;
    line.fences.erase(this);
    line.note_counts();
    line.lowered.notify_all();
}

MemoryRange Fence::extent() {
    FenceLine &line = FenceLine::get();
    std::lock_guard lock(line.mutex);
    MemoryRange extent{UINT64_MAX, 0};
    for (const Fence *fence : line.fences) {
        extent.begin = std::min(extent.begin, fence->ranges_.front().begin);
        extent.end = std::max(extent.end, fence->ranges_.back().end);
    }
    return extent;
}

void Fence::wait(MemoryRange range, Access access) {
    FenceLine &line = FenceLine::get();
    std::unique_lock lock(line.mutex);
    line.lowered.wait(lock, [&] { return !line.stands_in_the_way(range, access); });
}

} // namespace kvf
