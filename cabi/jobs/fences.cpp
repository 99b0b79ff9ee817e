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
    std::set<Fence *> fences;

    static FenceLine &get() {
        static FenceLine *line = [] {
            auto *made = new FenceLine;
            // In a forked child the transfers are the parent's, and will never end.
            on_fork([made] { made->mutex.lock(); }, [made] { made->mutex.unlock(); },
                    [made] {
                        // It still counts the parent's threads that waited, and would wait for
                        // them.
                        new (&made->lowered) std::condition_variable;
                        made->fences.clear();
                        Fence::count_ = 0;
                        Fence::row_stopping_count_ = 0;
                        made->mutex.unlock();
                    });
            return made;
        }();
        return *line;
    }

    void note_counts() {
        const auto close = std::count_if(fences.begin(), fences.end(), [](const Fence *fence) {
            return fence->enclosure_.stops_rows;
        });
        Fence::count_.store(static_cast<uint32_t>(fences.size()), std::memory_order_release);
        Fence::row_stopping_count_.store(static_cast<uint32_t>(close), std::memory_order_release);
    }

    // Closes the fences for which the condition holds, until they are lowered.
    template <class Condition>
    void stop_rows_if(Condition must_stop_rows) {
        for (Fence *fence : fences) {
            if (!fence->enclosure_.stops_rows && must_stop_rows(*fence))
                fence->enclosure_.stops_rows = true;
        }
        note_counts();
    }

    template <class Condition>
    void wait_while_any(std::unique_lock<std::mutex> &lock, Condition stands_in_the_way) {
        lowered.wait(lock,
                     [&] { return std::none_of(fences.begin(), fences.end(), stands_in_the_way); });
    }

    static bool is_disturbed(const Fence &fence) {
        const auto &ask = fence.enclosure_.is_disturbed;
        return ask && ask();
    }
};

namespace {

bool overlap(const std::vector<MemoryRange> &ranges, MemoryRange range) {
    const auto after = std::upper_bound(
        ranges.begin(), ranges.end(), range.begin,
        [](uint64_t begin, const MemoryRange &other) { return begin < other.end; });
    return after != ranges.end() && after->begin < range.end;
}

bool overlap(const std::vector<MemoryRange> &a, const std::vector<MemoryRange> &b) {
    return std::any_of(a.begin(), a.end(), [&](MemoryRange range) { return overlap(b, range); });
}

// Whether one of the rows of a tensor in `range` that are about to be written is one that the
// fence's transfer moves.
bool writes_a_row_of(const Enclosure &enclosure, MemoryRange range, RowNumbers written) {
    if (enclosure.rows.empty() || enclosure.rows.front().begin < range.begin ||
        enclosure.rows.back().end > range.end)
        return false; // of another tensor
    return std::any_of(written.numbers, written.numbers + written.count, [&](int64_t number) {
        const uint64_t begin = range.begin + static_cast<uint64_t>(number) * enclosure.row_bytes;
        return overlap(enclosure.rows, {begin, begin + enclosure.row_bytes});
    });
}

} // namespace

void Fence::raise(Enclosure enclosure) {
    if (enclosure.memory.empty()) return;
    FenceLine &line = FenceLine::get();
    std::lock_guard lock(line.mutex);
    enclosure_ = std::move(enclosure);
    line.fences.insert(this);
    standing_ = true;
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
        const auto &memory = fence->enclosure_.memory;
        extent.begin = std::min(extent.begin, memory.front().begin);
        extent.end = std::max(extent.end, memory.back().end);
    }
    return extent;
}

void Fence::wait(MemoryRange range, Access access, RowNumbers rows) {
    FenceLine &line = FenceLine::get();
    std::unique_lock lock(line.mutex);
    if (access == Access::WriteRows) {
        line.stop_rows_if([&](const Fence &fence) {
            return overlap(fence.enclosure_.memory, range) &&
                   (writes_a_row_of(fence.enclosure_, range, rows) ||
                    FenceLine::is_disturbed(fence));
        });
    }
    line.wait_while_any(lock, [&](const Fence *fence) {
        if (access == Access::Read && fence->direction_ == Direction::Save) return false;
        if (access == Access::WriteRows && !fence->enclosure_.stops_rows) return false;
        return overlap(fence->enclosure_.memory, range);
    });
}

void Fence::wait_for_rows(const std::vector<MemoryRange> &rows) {
    FenceLine &line = FenceLine::get();
    std::unique_lock lock(line.mutex);
    line.wait_while_any(lock,
                        [&](const Fence *fence) { return overlap(rows, fence->enclosure_.rows); });
}

void Fence::wait_for_disturbed(const void *context) {
    FenceLine &line = FenceLine::get();
    std::unique_lock lock(line.mutex);
    std::set<const Fence *> disturbed;
    for (const Fence *fence : line.fences) {
        if (fence->enclosure_.context == context && FenceLine::is_disturbed(*fence))
            disturbed.insert(fence);
    }
    // A new fence of another context may stand where one of these stood.
    line.wait_while_any(lock, [&](const Fence *fence) {
        return fence->enclosure_.context == context && disturbed.contains(fence);
    });
}

} // namespace kvf
