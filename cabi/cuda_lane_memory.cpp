#include "cuda_lane_memory.h"

#include <algorithm>
#include <new>

namespace kvf {
namespace {

constexpr uint64_t kBounce = 4 << 20;
constexpr uint64_t kLeastBounce = 1 << 20;
// Three stagings share what a lane may take: fewer and larger ones, since every piece costs some microseconds.
constexpr uint64_t kStagings = 3;
constexpr uint64_t kMostStaging = 16 << 20;  // with its table of rows
constexpr uint64_t kStagingGrain = 64 << 10; // its half is still as aligned as a table must be
constexpr uint64_t kDeviceGrain = 2 << 20;
constexpr uint64_t kSmallestStaging = CudaRowTable::kBytes + kStagingGrain; // where memory is short
// With less staging, all of it is for the pieces.
constexpr uint64_t kLeastForResident = 8 << 20;
// Of each at most, so that both lanes of a device pin 62 MiB at most: seven bounce buffers, four tables of 512 KiB and
// one of 1 MiB in each. (A lane has eight slots; those without one of them wait for their turn.)
constexpr size_t kMostBounces = 7;
constexpr size_t kMostStagings = 4;

// Drivers hand device memory out in units of 2 MiB.
uint64_t aligned(uint64_t bytes) {
    const uint64_t grain = bytes >= 2 * kDeviceGrain ? kDeviceGrain : kStagingGrain;
    return bytes / grain * grain;
}

uint64_t staging_size(uint64_t bytes) {
    const uint64_t share = aligned(std::min(kMostStaging, bytes / kStagings));
    return share >= CudaLaneMemory::kLeastStaging ? share : aligned(bytes / 2);
}

// Tries `make` with ever smaller sizes.
template <class Item>
std::unique_ptr<Item> make_smaller(const CudaContext &context, uint64_t bytes, uint64_t least) {
    for (;; bytes /= 2) {
        try {
            return std::make_unique<Item>(context, bytes);
        } catch (const Error &error) {
            if (error.status != KVF_ERR_OUT_OF_MEMORY || bytes / 2 < least) throw;
        } catch (const std::bad_alloc &) {
            throw Error(KVF_ERR_OUT_OF_MEMORY);
        }
    }
}

} // namespace

CudaBounce::CudaBounce(const CudaContext &context, uint64_t bytes)
    : context_(context), bytes_(bytes) {
    const CudaCurrent current(context_);
    const CudaDriver &driver = context_.driver();
    void *memory;
    driver.check(driver.cuMemHostAlloc(&memory, bytes, CU_MEMHOSTALLOC_PORTABLE), "cuMemHostAlloc");
    memory_ = static_cast<unsigned char *>(memory);
}

CudaBounce::~CudaBounce() {
    try {
        const CudaCurrent current(context_);
        context_.driver().cuMemFreeHost(memory_);
    } catch (const Error &) {
        // The context is gone, and the memory with it.
    }
}

CudaStaging::CudaStaging(const CudaContext &context, uint64_t bytes)
    : context_(context), bytes_(bytes - CudaRowTable::kBytes) {
    const CudaCurrent current(context_);
    const CudaDriver &driver = context_.driver();
    driver.check(driver.cuMemAlloc(&memory_, bytes), "cuMemAlloc");
    try {
        rows_ = std::make_unique<CudaRowTable>(context_, memory_ + bytes_);
    } catch (...) {
        driver.cuMemFree(memory_);
        throw;
    }
}

CudaStaging::~CudaStaging() {
    try {
        const CudaCurrent current(context_);
        context_.driver().cuMemFree(memory_);
    } catch (const Error &) {
        // The context is gone, and the memory with it.
    }
}

CudaResident::CudaResident(const CudaContext &context) : context_(context) {
    const CudaCurrent current(context_);
    const CudaDriver &driver = context_.driver();
    driver.check(driver.cuMemAlloc(&memory_, CudaResidentTable::kBytes), "cuMemAlloc");
    try {
        table_ = std::make_unique<CudaResidentTable>(context_, memory_);
    } catch (...) {
        driver.cuMemFree(memory_);
        throw;
    }
}

CudaResident::~CudaResident() {
    table_.reset();
    try {
        const CudaCurrent current(context_);
        context_.driver().cuMemFree(memory_);
    } catch (const Error &) {
        // The context is gone, and the memory with it.
    }
}

CudaLaneMemory::CudaLaneMemory(const CudaContext &context, uint64_t staging_bytes)
    : context_(context),
      for_stagings_(staging_bytes -
                    (staging_bytes >= kLeastForResident ? CudaResidentTable::kBytes : 0)),
      staging_(staging_size(for_stagings_)),
      stagings_most_(staging_ >= kLeastStaging
                         ? std::min<uint64_t>(kMostStagings, for_stagings_ / staging_)
                         : 0),
      has_resident_(for_stagings_ < staging_bytes), bounces_(kMostBounces),
      stagings_(stagings_most_), residents_(1), has_staging_(stagings_most_ > 0),
      may_reside_(has_resident_) {}

bool CudaLaneMemory::ensure_bounce() {
    return bounces_.ensure(
        [this] { return make_smaller<CudaBounce>(context_, kBounce, kLeastBounce); });
}

bool CudaLaneMemory::ensure_staging() {
    bool there = false;
    try {
        there = stagings_.ensure(
            [this] { return make_smaller<CudaStaging>(context_, staging_, kSmallestStaging); });
    } catch (const Error &) {
        // If the device is lost, whatever is done without it will say so.
        has_staging_.store(false, std::memory_order_relaxed);
        return false;
    }
    if (may_reside_.load(std::memory_order_relaxed)) {
        try {
            residents_.ensure([this] { return std::make_unique<CudaResident>(context_); });
        } catch (...) {
            may_reside_.store(false, std::memory_order_relaxed); // rows travel with each piece
        }
    }
    return there;
}

void CudaLaneMemory::trim() noexcept {
    bounces_.trim();
    stagings_.trim();
    residents_.trim();
    has_staging_.store(stagings_most_ > 0, std::memory_order_relaxed);
    may_reside_.store(has_resident_, std::memory_order_relaxed);
}

bool CudaLaneMemory::empty() const {
    return bounces_.empty() && stagings_.empty() && residents_.empty() &&
           has_staging() == (stagings_most_ > 0);
}

} // namespace kvf
