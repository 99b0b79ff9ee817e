// Memory that a lane lends to its slots: pinned bounce buffers for pageable memory, staging on the
// device, the tables of rows that its kernels read, and one table that stays on the device for many
// pieces.
//
// Memory is allocated when it is first needed, and kept for later pieces. Where memory is short,
// there are fewer or smaller buffers. An allocation that failed is not tried again before the lane
// has been idle.
#pragma once

#include <atomic>
#include <memory>

#include "cuda/arena.h"
#include "cuda/free_list.h"
#include "cuda/tables.h"

namespace kvf {

class CudaLaneMemory {
public:
    static constexpr uint64_t kLeastDevice = 2 << 20;

    // The most that a lane pins: seven bounce buffers of 4 MiB, four tables of 512 KiB and one of 1
    // MiB. (A lane has eight slots; those without a bounce buffer or a table wait for one.)
    static constexpr size_t kMostBounces = 7, kMostRows = 4;
    static constexpr uint64_t kBounce = 4 << 20, kLeastBounce = 1 << 20;
    static constexpr uint64_t kMostPinned =
        kMostBounces * kBounce + kMostRows * CudaRowTable::kBytes + CudaResidentTable::kBytes;
    // What each lane may pin even if the budget has nothing left: one of each kind, of the smallest
    // size.
    static constexpr uint64_t kLeastPinned =
        kLeastBounce + CudaRowTable::kBytes + CudaResidentTable::kBytes;

    // Uses `device_bytes` of device memory at most. With less than kLeastDevice it uses none, and
    // there is no staging.
    CudaLaneMemory(const CudaContext &context, CudaPinnedBudget &budget, uint64_t device_bytes);

    // Each returns NULL, or no segment, if none is free. Then the allocate function below makes
    // one, or tells that the caller must wait for one in use.
    std::unique_ptr<CudaPinnedMemory> acquire_bounce() { return bounces_.acquire(); }
    std::unique_ptr<CudaRowTable> acquire_rows() { return rows_.acquire(); }
    std::unique_ptr<CudaResidentTable> acquire_resident() { return residents_.acquire(); }
    CudaSegment acquire_staging(uint64_t least, uint64_t most) {
        return arena_.acquire(least, most);
    }
    // Each accepts NULL, or no segment.
    void release(std::unique_ptr<CudaPinnedMemory> bounce) noexcept {
        if (bounce) bounces_.release(std::move(bounce));
    }
    void release(std::unique_ptr<CudaRowTable> rows) noexcept {
        if (rows) rows_.release(std::move(rows));
    }
    void release(std::unique_ptr<CudaResidentTable> resident) noexcept {
        if (resident) residents_.release(std::move(resident));
    }
    void release(CudaSegment staging) noexcept {
        if (staging) arena_.release(staging);
    }

    // Returns true if a bounce buffer is free now, false if the caller must wait for one in use.
    // Throws if there is none at all.
    bool allocate_bounce();
    // As allocate_bounce(), for a table of rows; but if there is none at all, has_staging() is
    // false from then on.
    bool allocate_rows();
    // Allocates staging and a table of rows. If there is too little memory, has_staging() is false
    // from then on.
    void allocate_staging();
    // Allocates the resident table. If there is too little memory, has_resident() is false from
    // then on.
    void allocate_resident();

    bool has_staging() const { return has_staging_.load(std::memory_order_relaxed); }
    bool has_resident() const { return has_resident_.load(std::memory_order_relaxed); }
    // The size of all segments together; 0 before allocate_staging().
    uint64_t staging_bytes() const { return arena_.bytes(); }

    // Frees what no slot uses. Allocations that failed may be tried again. Any thread.
    void trim() noexcept;
    // Whether there is nothing to free, and no allocation failed.
    bool empty() const;
    uint64_t pinned_bytes() const {
        return bounces_.pinned_bytes() + rows_.pinned_bytes() + residents_.pinned_bytes();
    }

private:
    const CudaContext &context_;
    const bool may_stage_, may_reside_;
    CudaArena arena_;
    CudaFreeList<CudaPinnedMemory> bounces_;
    CudaFreeList<CudaRowTable> rows_;
    CudaFreeList<CudaResidentTable> residents_; // one at most
    std::atomic<bool> has_staging_, has_resident_;
};

} // namespace kvf
