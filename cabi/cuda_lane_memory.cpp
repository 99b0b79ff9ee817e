#include "cuda_lane_memory.h"

#include <algorithm>
#include <new>

namespace kvf {
namespace {

constexpr uint64_t kBounce = 4 << 20;
constexpr uint64_t kLeastBounce = 1 << 20;
constexpr uint64_t kStaging = 8 << 20; // with its table of rows
// Of each at most, so that both lanes of a device pin 62 MiB at most: seven bounce buffers and six tables of 512 KiB
// in each. (A lane has eight slots; those without one of them wait for their turn.)
constexpr size_t kMostBounces = 7;
constexpr size_t kMostStagings = 6;

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

CudaLaneMemory::CudaLaneMemory(const CudaContext &context, uint64_t staging_bytes)
    : context_(context), staging_(std::min(kStaging, staging_bytes / 2)),
      stagings_most_(staging_ >= kLeastStaging
                         ? std::min<uint64_t>(kMostStagings, staging_bytes / staging_)
                         : 0),
      bounces_(kMostBounces), stagings_(stagings_most_), has_staging_(stagings_most_ > 0) {}

bool CudaLaneMemory::ensure_bounce() {
    return bounces_.ensure(
        [this] { return make_smaller<CudaBounce>(context_, kBounce, kLeastBounce); });
}

bool CudaLaneMemory::ensure_staging() {
    try {
        return stagings_.ensure(
            [this] { return make_smaller<CudaStaging>(context_, staging_, kLeastStaging); });
    } catch (const Error &) {
        // If the device is lost, whatever is done without it will say so.
        has_staging_.store(false, std::memory_order_relaxed);
        return false;
    }
}

void CudaLaneMemory::trim() noexcept {
    bounces_.trim();
    stagings_.trim();
    has_staging_.store(stagings_most_ > 0, std::memory_order_relaxed);
}

bool CudaLaneMemory::empty() const {
    return bounces_.empty() && stagings_.empty() && has_staging() == (stagings_most_ > 0);
}

} // namespace kvf
