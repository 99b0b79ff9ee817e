// A load ahead: a state is brought to the device before it is known where its parts belong, while libllama still takes
// cells and lists fragments; and moved to their places, within the device, as soon as both are known.
#pragma once

#include <memory>

#include "memory/layout.h"

namespace kvf {

class Job;

// Where it is brought. All functions may be called by any thread.
class Landing {
public:
    virtual ~Landing() = default;

    // What brings the buffer here: the layout of a leg.
    virtual Layout approach() const = 0;
    // What lies before that offset in the buffer is here.
    virtual void advance(uint64_t offset) noexcept = 0;
    // The leg has ended: all of it is here, or the job is stopping.
    virtual void arrive() noexcept = 0;
    // Where the parts belong; called once. Ends with one job->end_work(): when they are there, or when the job is
    // stopping and nothing of this is under way.
    virtual void land(std::shared_ptr<Job> job, Layout &&layout) noexcept = 0;
};

} // namespace kvf
