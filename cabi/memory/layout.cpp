#include "memory/layout.h"

#include <algorithm>

namespace kvf {

namespace {

// Returns NULL, and where the region ends in the buffer; or what is wrong with the region.
const char *find_fault(const kvf_region &r, uint64_t &buffer_end) {
    constexpr const char *kTooLarge = "is larger than the address space";
    if (r.address == 0) return "address is 0";
    if (r.width == 0 || r.rows == 0) return "width and rows must not be 0";
    uint64_t span = 0, buffer_span = 0;
    if (r.rows > 1) {
        if (r.pitch < r.width || r.buffer_pitch < r.width) return "pitch is less than width";
        if (__builtin_mul_overflow(r.rows - 1, r.pitch, &span) ||
            __builtin_mul_overflow(r.rows - 1, r.buffer_pitch, &buffer_span))
            return kTooLarge;
    }
    uint64_t end = 0;
    if (__builtin_add_overflow(span, r.width, &span) ||
        __builtin_add_overflow(r.address, span, &end) ||
        __builtin_add_overflow(buffer_span, r.width, &buffer_span) ||
        __builtin_add_overflow(r.offset, buffer_span, &buffer_end))
        return kTooLarge;
    return nullptr;
}

} // namespace

uint64_t regions_size(const kvf_region *regions, uint64_t count) {
    if (count && !regions) throw Error(KVF_ERR_INVALID_ARGUMENT, "regions is NULL");
    uint64_t size = 0;
    for (uint64_t i = 0; i < count; ++i) {
        uint64_t end = 0;
        if (const char *why = find_fault(regions[i], end)) {
            throw Error(KVF_ERR_INVALID_ARGUMENT,
                        format("region %llu: %s", static_cast<unsigned long long>(i), why));
        }
        size = std::max(size, end);
    }
    return size;
}

} // namespace kvf
