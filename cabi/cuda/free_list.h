// A free list of things that hold pinned memory: what a lane has used is kept for the pieces that follow.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "core/status.h"

namespace kvf {

// One thread acquires and releases items; any thread may trim.
template <class Item>
class CudaFreeList {
public:
    // At most `most` items are made.
    explicit CudaFreeList(size_t most) : most_(most) { free_.reserve(most); }

    // Returns NULL if no item is free.
    std::unique_ptr<Item> acquire() {
        std::lock_guard lock(mutex_);
        if (free_.empty()) return nullptr;
        auto item = std::move(free_.back());
        free_.pop_back();
        ++used_;
        return item;
    }
    void release(std::unique_ptr<Item> item) noexcept {
        std::lock_guard lock(mutex_);
        --used_;
        free_.push_back(std::move(item)); // there is room
    }
    // Makes an item with `make` unless one is free. Returns true if one is free now, false if one in use has to be waited
    // for. Throws what `make` throws where there is no item at all.
    template <class Make>
    bool ensure(Make &&make) {
        {
            std::lock_guard lock(mutex_);
            if (!free_.empty()) return true;
            if (used_ > 0 && (is_scarce_ || used_ == most_)) return false;
        }
        try {
            std::unique_ptr<Item> made =
                make(); // without the lock, since the driver takes its time
            std::lock_guard lock(mutex_);
            pinned_bytes_ += made->pinned_bytes();
            free_.push_back(std::move(made));
            return true;
        } catch (const Error &error) {
            if (error.status == KVF_ERR_DEVICE_LOST || !note_scarce()) throw;
        } catch (const std::bad_alloc &) {
            if (!note_scarce()) throw Error(KVF_ERR_OUT_OF_MEMORY);
        }
        return false;
    }
    // Destroys the free items.
    void trim() noexcept {
        for (;;) {
            std::unique_ptr<Item> item; // is destroyed without the lock
            std::lock_guard lock(mutex_);
            is_scarce_ = false;
            if (free_.empty()) return;
            item = std::move(free_.back());
            free_.pop_back();
            pinned_bytes_ -= item->pinned_bytes();
        }
    }
    // Whether there is no item, free or in use.
    bool empty() const {
        std::lock_guard lock(mutex_);
        return free_.empty() && used_ == 0;
    }
    uint64_t pinned_bytes() const {
        std::lock_guard lock(mutex_);
        return pinned_bytes_;
    }

private:
    // No more items could be made. Returns false if there is none at all.
    bool note_scarce() {
        std::lock_guard lock(mutex_);
        return is_scarce_ = used_ > 0;
    }

    const size_t most_;
    mutable std::mutex mutex_;
    std::vector<std::unique_ptr<Item>> free_;
    size_t used_ = 0;
    bool is_scarce_ = false; // no more are made before the next trim()
    uint64_t pinned_bytes_ = 0;
};

} // namespace kvf
