// A free list of items that hold pinned memory: what a lane has used is kept for later pieces.
#pragma once

#include <algorithm>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "core/status.h"
#include "cuda/pinned_budget.h"

namespace kvf {

// One thread makes, acquires and releases items; any thread may trim.
template <class Item>
class CudaFreeList {
public:
    // The list has `count` items at most, of `most_bytes` each, or down to `least_bytes` where
    // memory is short. The budget is charged for all that they pin, except for `least_bytes` of the
    // first item, so that there can always be one item, whatever other lists have taken.
    CudaFreeList(CudaPinnedBudget &budget, size_t count, uint64_t most_bytes, uint64_t least_bytes)
        : budget_(budget), count_(count), most_bytes_(most_bytes), least_bytes_(least_bytes) {
        free_.reserve(count);
    }
    ~CudaFreeList() { trim(); }
    CudaFreeList(const CudaFreeList &) = delete;
    CudaFreeList &operator=(const CudaFreeList &) = delete;

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
    // Makes an item with `make(bytes)` unless one is free. Returns true if one is free now, false
    // if the caller must wait for one in use. Throws what `make` throws if there is no item at all.
    template <class Make>
    bool ensure(Make &&make) {
        {
            std::lock_guard lock(mutex_);
            if (!free_.empty()) return true;
            if (used_ > 0 && (is_scarce_ || used_ == count_)) return false;
        }
        return make_item(make);
    }
    // Destroys the free items.
    void trim() noexcept {
        for (;;) {
            std::unique_ptr<Item> item; // is destroyed without the lock
            {
                std::lock_guard lock(mutex_);
                is_scarce_ = false;
                if (free_.empty()) return;
                item = std::move(free_.back());
                free_.pop_back();
                // Before the memory is freed, which may take milliseconds: a lane that has no other
                // item can get one during that time.
                uncharge(item->pinned_bytes());
            }
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
    // Returns true if an item is free now, false if the caller must wait for one in use.
    template <class Make>
    bool make_item(Make &make) {
        for (uint64_t bytes = most_bytes_; bytes >= least_bytes_; bytes /= 2) {
            try {
                if (add(bytes, make)) return true;
            } catch (const Error &error) {
                const bool may_be_smaller = bytes / 2 >= least_bytes_;
                if (error.status == KVF_ERR_OUT_OF_MEMORY && may_be_smaller) continue;
                if (error.status == KVF_ERR_DEVICE_LOST || !note_scarce()) throw;
                return false;
            } catch (const std::bad_alloc &) {
                if (!note_scarce()) throw Error(KVF_ERR_OUT_OF_MEMORY);
                return false;
            }
        }
        return false; // others are in use, since the first item costs the budget nothing
    }

    // Makes an item, without the lock, since the driver takes its time. Returns false if the budget
    // has too little left. (Other devices may release some at any time.)
    template <class Make>
    bool add(uint64_t bytes, Make &make) {
        if (!charge(bytes)) return false;
        try {
            std::unique_ptr<Item> made = make(bytes);
            std::lock_guard lock(mutex_);
            free_.push_back(std::move(made)); // there is room
            return true;
        } catch (...) {
            std::lock_guard lock(mutex_);
            uncharge(bytes);
            throw;
        }
    }

    // Returns what the budget is charged for so many pinned bytes.
    uint64_t charge_of(uint64_t bytes) const { return bytes - std::min(bytes, least_bytes_); }
    // Returns false if the budget has too little left.
    bool charge(uint64_t bytes) {
        std::lock_guard lock(mutex_);
        if (!budget_.acquire(charge_of(pinned_bytes_ + bytes) - charge_of(pinned_bytes_)))
            return false;
        pinned_bytes_ += bytes;
        return true;
    }
    // With the lock.
    void uncharge(uint64_t bytes) noexcept {
        const uint64_t before = charge_of(pinned_bytes_);
        pinned_bytes_ -= bytes;
        budget_.release(before - charge_of(pinned_bytes_));
    }

    // Notes that no more items could be made. Returns false if there is none at all.
    bool note_scarce() {
        std::lock_guard lock(mutex_);
        return is_scarce_ = used_ > 0;
    }

    CudaPinnedBudget &budget_;
    const size_t count_;
    const uint64_t most_bytes_, least_bytes_;
    mutable std::mutex mutex_;
    std::vector<std::unique_ptr<Item>> free_;
    size_t used_ = 0;
    bool is_scarce_ = false; // no more items are made before the next trim()
    uint64_t pinned_bytes_ = 0;
};

} // namespace kvf
