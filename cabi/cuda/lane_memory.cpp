#include "cuda/lane_memory.h"

#include <algorithm>

namespace kvf {
namespace {

constexpr uint64_t kMostStaging = 64 << 20; // the pieces of a lane cannot use more
// With less device memory than this, all of it is for staging and tables of rows.
constexpr uint64_t kLeastForResident = 8 << 20;
size_t most_rows(uint64_t device_bytes) {
    return std::clamp<uint64_t>(device_bytes / (4 << 20), 1, CudaLaneMemory::kMostRows);
}

uint64_t arena_bytes(uint64_t device_bytes) {
    constexpr uint64_t kGrain = CudaDeviceMemory::kGrain;
    if (device_bytes < CudaLaneMemory::kLeastDevice) return 0;
    uint64_t bytes = device_bytes - most_rows(device_bytes) * CudaRowTable::kBytes;
    if (device_bytes >= kLeastForResident) bytes -= CudaResidentTable::kBytes;
    bytes = std::min(bytes, kMostStaging);
    const uint64_t grain = bytes >= 2 * kGrain ? kGrain : CudaArena::kAlignment;
    return bytes / grain * grain;
}

} // namespace

CudaLaneMemory::CudaLaneMemory(const CudaContext &context, CudaPinnedBudget &budget,
                               uint64_t device_bytes)
    : context_(context), may_stage_(device_bytes >= kLeastDevice),
      may_reside_(device_bytes >= kLeastForResident), arena_(context, arena_bytes(device_bytes)),
      bounces_(budget, kMostBounces, kBounce, kLeastBounce),
      rows_(budget, most_rows(device_bytes), CudaRowTable::kBytes, CudaRowTable::kBytes),
      residents_(budget, 1, CudaResidentTable::kBytes, CudaResidentTable::kBytes),
      has_staging_(may_stage_), has_resident_(may_reside_) {}

bool CudaLaneMemory::allocate_bounce() {
    return bounces_.ensure(
        [this](uint64_t bytes) { return std::make_unique<CudaPinnedMemory>(context_, bytes); });
}

bool CudaLaneMemory::allocate_rows() {
    try {
        return rows_.ensure([this](uint64_t) { return std::make_unique<CudaRowTable>(context_); });
    } catch (...) {
        has_staging_.store(false, std::memory_order_relaxed);
        return true;
    }
}

void CudaLaneMemory::allocate_staging() {
    try {
        if (!allocate_rows() || !has_staging()) return;
        arena_.allocate();
    } catch (...) {
        // Pieces do without staging. If the device is lost, their copies will report it.
        has_staging_.store(false, std::memory_order_relaxed);
    }
}

void CudaLaneMemory::allocate_resident() {
    try {
        residents_.ensure(
            [this](uint64_t) { return std::make_unique<CudaResidentTable>(context_); });
    } catch (...) {
        has_resident_.store(false, std::memory_order_relaxed); // each piece brings its own table
    }
}

void CudaLaneMemory::trim() noexcept {
    bounces_.trim();
    rows_.trim();
    residents_.trim();
    arena_.trim();
    has_staging_.store(may_stage_, std::memory_order_relaxed);
    has_resident_.store(may_reside_, std::memory_order_relaxed);
}

bool CudaLaneMemory::empty() const {
    return bounces_.empty() && rows_.empty() && residents_.empty() && !arena_.is_allocated() &&
           has_staging() == may_stage_ && has_resident() == may_reside_;
}

} // namespace kvf
