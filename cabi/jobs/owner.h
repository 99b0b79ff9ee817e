// The owner of jobs: the engine, as jobs and devices see it. Not the owner of memory.
#pragma once

#include <cstdint>
#include <list>
#include <memory>

#include "kvferry.h"

namespace kvf {

class Job;

// Calls that the dispatch thread is to make. In nodes of a list, so that a job has its own from the
// beginning, and its end needs no memory.
struct Callback {
    kvf_completion_callback function;
    kvf_completion completion;
};
using Callbacks = std::list<Callback>;

// Any thread may call these functions.
class JobOwner : public std::enable_shared_from_this<JobOwner> {
public:
    virtual ~JobOwner() = default;

    // Cuts short the legs of all jobs that are stopping, as Job::cut_short() does for one.
    virtual void cut_short_stopping() = 0;

    // What `stream` is given from now on waits until the job has ended.
    virtual void make_stream_wait(uint64_t stream, Job &job) = 0;

    // Has the dispatch thread call the callbacks.
    virtual void dispatch(Callbacks &&callbacks) = 0;
    // The last call for a job. The owner may be gone when it returns.
    virtual void job_ended(Job &job) = 0;

    // Records that `device` moved these bytes of the job between these two points in time.
    virtual void trace(const Job &job, uint64_t begin_ns, uint64_t end_ns, uint64_t bytes,
                       uint32_t device) = 0;
};

} // namespace kvf
