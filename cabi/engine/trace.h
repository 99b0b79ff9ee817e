// What moved when, for kvf_engine_trace().
#pragma once

#include <cstdint>
#include <deque>
#include <mutex>

#include "jobs/job.h"

namespace kvf {

// Thread-safe.
class Trace {
public:
    // A trace that is not enabled records nothing.
    explicit Trace(bool enabled) : enabled_(enabled) {}

    // `device` has moved these bytes of the job between these two points in time.
    void add(const Job &job, uint64_t begin_ns, uint64_t end_ns, uint64_t bytes, uint32_t device);
    // Moves the oldest events into an array whose elements are `stride` bytes apart. Returns how
    // many. Throws KVF_ERR_UNSUPPORTED if the trace is not enabled.
    uint32_t take(void *events, uint64_t stride, uint32_t capacity);

private:
    const bool enabled_;
    std::mutex mutex_;
    std::deque<kvf_trace_event> events_;
};

} // namespace kvf
