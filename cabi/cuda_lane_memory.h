// Memory that a lane borrows for its pieces: pinned bounce buffers for what goes to or comes from pageable memory,
// staging on the device with the table of rows that its kernels read, and a table that stays for many pieces.
//
// It is taken when it is first wanted, and kept for the pieces that follow. Where there is little, there is less of it,
// or smaller; what could not be had is not asked for again before the lane has been idle.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda_tables.h"

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

class CudaStaging {
public:
    // `bytes` with the table. Throws where it cannot be had.
    CudaStaging(const CudaContext &context, uint64_t bytes);
    ~CudaStaging();
    CudaStaging(const CudaStaging &) = delete;
    CudaStaging &operator=(const CudaStaging &) = delete;

    CUdeviceptr memory() const { return memory_; }
    uint64_t bytes() const { return bytes_; }
    CudaRowTable &rows() { return *rows_; }
    uint64_t pinned_bytes() const { return CudaRowTable::kBytes; }

private:
    const CudaContext &context_;
    CUdeviceptr memory_ = 0;
    const uint64_t bytes_; // without the table
    std::unique_ptr<CudaRowTable> rows_;
};

class CudaResident {
public:
    // Throws where it cannot be had.
    explicit CudaResident(const CudaContext &context);
    ~CudaResident();
    CudaResident(const CudaResident &) = delete;
    CudaResident &operator=(const CudaResident &) = delete;

    CudaResidentTable &table() { return *table_; }
    uint64_t pinned_bytes() const { return CudaResidentTable::kBytes; }

private:
    const CudaContext &context_;
    CUdeviceptr memory_ = 0;
    std::unique_ptr<CudaResidentTable> table_;
};

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
            std::lock_guard lock(mutex_);
            if (taken_ == 0 || error.status == KVF_ERR_DEVICE_LOST) throw;
            scarce_ = true;
            return false;
        }
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
    const size_t most_;
    mutable std::mutex mutex_;
    std::vector<std::unique_ptr<Item>> free_;
    size_t taken_ = 0;
    bool scarce_ = false; // there was no more
    uint64_t pinned_bytes_ = 0;
};

class CudaLaneMemory {
public:
    static constexpr uint64_t kLeastStaging = 1 << 20; // with its table, where memory is not short

    // `staging_bytes` of device memory at most; with less than two times kLeastStaging there is
    // none.
    CudaLaneMemory(const CudaContext &context, uint64_t staging_bytes);

    std::unique_ptr<CudaBounce> take_bounce() { return bounces_.take(); }
    std::unique_ptr<CudaStaging> take_staging() { return stagings_.take(); }
    std::unique_ptr<CudaResident> take_resident() { return residents_.take(); }
    void put_back(std::unique_ptr<CudaBounce> bounce) noexcept {
        if (bounce) bounces_.put_back(std::move(bounce));
    }
    void put_back(std::unique_ptr<CudaStaging> staging) noexcept {
        if (staging) stagings_.put_back(std::move(staging));
    }
    void put_back(std::unique_ptr<CudaResident> resident) noexcept {
        if (resident) residents_.put_back(std::move(resident));
    }

    // Sees to it that a bounce buffer is free. False: one will be put back. Throws where there is none at all.
    bool ensure_bounce();
    // As above for staging, and with it for the resident table if that can be had. Where there is no staging at all,
    // has_staging() is false from then on.
    bool ensure_staging();
    bool has_staging() const { return has_staging_.load(std::memory_order_relaxed); }

    // Gives back to the system what nobody has borrowed; what was scarce is tried again. Any thread.
    void trim() noexcept;
    // There is nothing to trim, and nothing was scarce.
    bool empty() const;
    uint64_t pinned_bytes() const {
        return bounces_.pinned_bytes() + stagings_.pinned_bytes() + residents_.pinned_bytes();
    }

private:
    const CudaContext &context_;
    const uint64_t for_stagings_; // bytes of device memory: all but what the resident table takes
    const uint64_t staging_;      // bytes of one, with its table
    const size_t stagings_most_;
    const bool has_resident_;
    CudaShelf<CudaBounce> bounces_;
    CudaShelf<CudaStaging> stagings_;
    CudaShelf<CudaResident> residents_; // one
    std::atomic<bool> has_staging_, may_reside_;
};

} // namespace kvf
