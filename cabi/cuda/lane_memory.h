// Memory that a lane borrows for its pieces: pinned bounce buffers for what goes to or comes from pageable memory,
// staging on the device, the tables of rows that its kernels read, and a table that stays for many pieces.
//
// It is taken when it is first wanted, and kept for the pieces that follow. Where there is little, there is less of it,
// or smaller; what could not be had is not asked for again before the lane has been idle.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "cuda/arena.h"
#include "cuda/tables.h"

namespace kvf {

class CudaBounce {
public:
    // Throws where it cannot be had.
    CudaBounce(const CudaContext &context, uint64_t bytes);
    ~CudaBounce();
    CudaBounce(const CudaBounce &) = delete;
    CudaBounce &operator=(const CudaBounce &) = delete;

    unsigned char *memory() const { return memory_; }
    uint64_t bytes() const { return bytes_; }
    uint64_t pinned_bytes() const { return bytes_; }

private:
    const CudaContext &context_;
    unsigned char *memory_ = nullptr;
    const uint64_t bytes_;
};

// A table with the device memory that it needs.
template <class Table>
class CudaPlaced {
public:
    // Throws where it cannot be had.
    explicit CudaPlaced(const CudaContext &context) : context_(context) {
        const CudaCurrent current(context_);
        const CudaDriver &driver = context_.driver();
        driver.check(driver.cuMemAlloc(&memory_, Table::kBytes), "cuMemAlloc");
        try {
            table_ = std::make_unique<Table>(context_, memory_);
        } catch (...) {
            driver.cuMemFree(memory_);
            throw;
        }
    }
    ~CudaPlaced() {
        table_.reset();
        try {
            const CudaCurrent current(context_);
            context_.driver().cuMemFree(memory_);
        } catch (const Error &) {
            // The context is gone, and the memory with it.
        }
    }
    CudaPlaced(const CudaPlaced &) = delete;
    CudaPlaced &operator=(const CudaPlaced &) = delete;

    Table &table() { return *table_; }
    uint64_t pinned_bytes() const { return Table::kBytes; }

private:
    const CudaContext &context_;
    CUdeviceptr memory_ = 0;
    std::unique_ptr<Table> table_;
};
using CudaRowsPlaced = CudaPlaced<CudaRowTable>;
using CudaResident = CudaPlaced<CudaResidentTable>;

// A few things of one kind. One thread borrows them; any thread may trim.
template <class Item>
class CudaShelf {
public:
    explicit CudaShelf(size_t most) : most_(most) { free_.reserve(most); }

    // NULL if none is free.
    std::unique_ptr<Item> take() {
        std::lock_guard lock(mutex_);
        if (free_.empty()) return nullptr;
        auto item = std::move(free_.back());
        free_.pop_back();
        ++taken_;
        return item;
    }
    void put_back(std::unique_ptr<Item> item) noexcept {
        std::lock_guard lock(mutex_);
        --taken_;
        free_.push_back(std::move(item)); // there is room
    }
    // Sees to it that one is free, with `make` where that is needed. False: one will be put back. Throws what `make`
    // does where there is none at all.
    template <class Make>
    bool ensure(Make &&make) {
        {
            std::lock_guard lock(mutex_);
            if (!free_.empty()) return true;
            if (taken_ > 0 && (scarce_ || taken_ == most_)) return false;
        }
        try {
            std::unique_ptr<Item> made = make(); // the driver takes its time
            std::lock_guard lock(mutex_);
            pinned_bytes_ += made->pinned_bytes();
            free_.push_back(std::move(made));
            return true;
        } catch (const Error &error) {
            if (error.status == KVF_ERR_DEVICE_LOST || !is_scarce()) throw;
        } catch (const std::bad_alloc &) {
            if (!is_scarce()) throw Error(KVF_ERR_OUT_OF_MEMORY);
        }
        return false;
    }
    // Gives back to the system what is free.
    void trim() noexcept {
        for (;;) {
            std::unique_ptr<Item> item; // goes without the lock
            std::lock_guard lock(mutex_);
            scarce_ = false;
            if (free_.empty()) return;
            item = std::move(free_.back());
            free_.pop_back();
            pinned_bytes_ -= item->pinned_bytes();
        }
    }
    bool empty() const {
        std::lock_guard lock(mutex_);
        return free_.empty() && taken_ == 0;
    }
    uint64_t pinned_bytes() const {
        std::lock_guard lock(mutex_);
        return pinned_bytes_;
    }

private:
    // More could not be had. False if there is none at all.
    bool is_scarce() {
        std::lock_guard lock(mutex_);
        return scarce_ = taken_ > 0;
    }

    const size_t most_;
    mutable std::mutex mutex_;
    std::vector<std::unique_ptr<Item>> free_;
    size_t taken_ = 0;
    bool scarce_ = false; // there was no more
    uint64_t pinned_bytes_ = 0;
};

class CudaLaneMemory {
public:
    static constexpr uint64_t kLeastDevice = 2 << 20;

    // `device_bytes` of device memory at most; with less than kLeastDevice there is none, and no staging.
    CudaLaneMemory(const CudaContext &context, uint64_t device_bytes);

    // NULL, or none, where none is free: then the function below gets it, or says that it will be put back.
    std::unique_ptr<CudaBounce> take_bounce() { return bounces_.take(); }
    std::unique_ptr<CudaRowsPlaced> take_rows() { return rows_.take(); }
    std::unique_ptr<CudaResident> take_resident() { return residents_.take(); }
    CudaStaging take_staging(uint64_t least, uint64_t most) { return arena_.take(least, most); }
    uint64_t staging_bytes() const { return arena_.bytes(); } // over all; 0: none yet
    void put_back(std::unique_ptr<CudaBounce> bounce) noexcept {
        if (bounce) bounces_.put_back(std::move(bounce));
    }
    void put_back(std::unique_ptr<CudaRowsPlaced> rows) noexcept {
        if (rows) rows_.put_back(std::move(rows));
    }
    void put_back(std::unique_ptr<CudaResident> resident) noexcept {
        if (resident) residents_.put_back(std::move(resident));
    }
    void put_back(CudaStaging staging) noexcept {
        if (staging) arena_.put_back(staging);
    }

    // Sees to it that a bounce buffer is free. False: one will be put back. Throws where there is none at all.
    bool ensure_bounce();
    // Has staging and a table of rows. Where there is too little memory for that, has_staging() is false from then on.
    void allocate_staging();
    // Sees to it that a table of rows is free. False: one will be put back. Where there is none at all, has_staging() is
    // false from then on.
    bool ensure_rows();
    bool has_staging() const { return has_staging_.load(std::memory_order_relaxed); }
    // Has the resident table. Where it cannot be had, has_resident() is false from then on.
    void allocate_resident();
    bool has_resident() const { return has_resident_.load(std::memory_order_relaxed); }

    // Gives back to the system what nobody has borrowed; what was scarce is tried again. Any thread.
    void trim() noexcept;
    // There is nothing to trim, and nothing was scarce.
    bool empty() const;
    uint64_t pinned_bytes() const {
        return bounces_.pinned_bytes() + rows_.pinned_bytes() + residents_.pinned_bytes();
    }

private:
    const CudaContext &context_;
    const bool may_stage_, may_reside_;
    CudaArena arena_;
    CudaShelf<CudaBounce> bounces_;
    CudaShelf<CudaRowsPlaced> rows_;
    CudaShelf<CudaResident> residents_; // one
    std::atomic<bool> has_staging_, has_resident_;
};

} // namespace kvf
