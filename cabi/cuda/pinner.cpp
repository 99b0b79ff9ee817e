#include "cuda/pinner.h"

#include <algorithm>
#include <mutex>
#include <new>
#include <vector>

namespace kvf {
namespace {

// Host memory that is registered with the driver for ever because a device was given up. Its owner
// may unmap it nevertheless: memory that is mapped at that address later is not the memory that the
// driver has pinned.
class StaleRegistrations {
public:
    void add(const void *memory, uint64_t bytes) {
        std::lock_guard lock(mutex_);
        const auto begin = reinterpret_cast<uint64_t>(memory);
        ranges_.push_back({begin, begin + bytes});
    }
    bool overlap(const void *memory, uint64_t bytes) {
        std::lock_guard lock(mutex_);
        const auto begin = reinterpret_cast<uint64_t>(memory);
        return std::any_of(ranges_.begin(), ranges_.end(), [&](const Range &range) {
            return begin < range.end && range.begin < begin + bytes;
        });
    }

private:
    struct Range {
        uint64_t begin, end;
    };

    std::mutex mutex_;
    std::vector<Range> ranges_;
};

// One for the process: engines that are made later find the registrations too.
StaleRegistrations &stale_registrations() {
    // Never destroyed, since threads may outlive static destructors.
    static auto *instance = new StaleRegistrations;
    return *instance;
}

struct PinnedRange {
    bool is_pinned = false;
    uint64_t end = 0; // 0 where the driver does not tell
};

// Asks the driver for the pinned memory that an address lies in. A context is current.
PinnedRange pinned_range(const CudaDriver &driver, uint64_t address) {
    unsigned int type = 0;
    CUdeviceptr begin = 0;
    size_t size = 0;
    CUpointer_attribute attributes[] = {CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
                                        CU_POINTER_ATTRIBUTE_RANGE_START_ADDR,
                                        CU_POINTER_ATTRIBUTE_RANGE_SIZE};
    void *values[] = {&type, &begin, &size};
    const CUresult result = driver.cuPointerGetAttributes(3, attributes, values, address);
    if (result != CUDA_SUCCESS || type != CU_MEMORYTYPE_HOST) return {};
    const bool is_inside = begin <= address && address - begin < size;
    return {true, is_inside ? begin + size : 0};
}

} // namespace

void CudaPinner::pin(void *memory, uint64_t bytes) {
    const CudaContext &context = usable(contexts_);
    const CudaCurrent current(context);
    const CudaDriver &driver = context.driver();
    driver.check(driver.cuMemHostRegister(memory, bytes, CU_MEMHOSTREGISTER_PORTABLE),
                 "cuMemHostRegister");
}

bool CudaPinner::unpin(void *memory, uint64_t bytes) noexcept {
    const bool any_given_up = std::any_of(contexts_.begin(), contexts_.end(),
                                          [](const auto &context) { return context->given_up(); });
    if (!any_given_up) {
        clean_up(contexts_, [&](const CudaDriver &driver) { driver.cuMemHostUnregister(memory); });
        return true;
    }
    try {
        stale_registrations().add(memory, bytes);
    } catch (const std::bad_alloc &) {
        // The range cannot be noted. Its memory stays mapped unless its owner unmaps it.
    }
    return false;
}

bool CudaPinner::is_pinned(const void *memory, uint64_t bytes) const {
    if (stale_registrations().overlap(memory, bytes)) return false;
    const CudaContext &context = usable(contexts_);
    const CudaCurrent current(context);
    const uint64_t begin = reinterpret_cast<uint64_t>(memory), end = begin + bytes;
    const PinnedRange range = pinned_range(context.driver(), begin);
    if (!range.is_pinned) return false;
    // Where the driver does not tell the end of the range, the last byte has to do.
    if (range.end == 0) return pinned_range(context.driver(), end - 1).is_pinned;
    // Neighbouring ranges do not count: a copy across two registrations is refused (seen on driver
    // 580).
    return range.end >= end;
}

} // namespace kvf
