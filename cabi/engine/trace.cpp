#include "engine/trace.h"

#include <new>

namespace kvf {
namespace {

constexpr size_t kMostEvents = 65536; // then the oldest are dropped

} // namespace

void Trace::add(const Job &job, uint64_t begin_ns, uint64_t end_ns, uint64_t bytes,
                uint32_t device) {
    if (!enabled_) return;
    std::lock_guard lock(mutex_);
    if (events_.size() == kMostEvents) events_.pop_front();
    try {
        events_.push_back({job.handle, job.request.user_data, begin_ns, end_ns, bytes, device,
                           static_cast<uint32_t>(job.request.direction)});
    } catch (const std::bad_alloc &) {
        // A transfer does not fail for want of its trace.
    }
}

uint32_t Trace::take(void *events, uint64_t stride, uint32_t capacity) {
    if (!enabled_) {
        throw Error(KVF_ERR_UNSUPPORTED, "the engine was created without KVF_ENGINE_TRACE");
    }
    std::lock_guard lock(mutex_);
    auto *out = static_cast<unsigned char *>(events);
    uint32_t n = 0;
    for (; n < capacity && !events_.empty(); ++n, out += stride) {
        copy_struct(events_.front(), out, stride);
        events_.pop_front();
    }
    return n;
}

} // namespace kvf
