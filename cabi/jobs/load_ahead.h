// A load ahead: the state is staged in device memory of its own while libllama still takes cells
// and lists fragments. When it is known where the bytes belong, they are copied from there to their
// places, within the device.
#pragma once

#include <memory>

#include "memory/layout.h"

namespace kvf {

class Job;

// Device memory for one state, and the copies from there. Any thread may call these functions.
class LoadAhead {
public:
    virtual ~LoadAhead() = default;

    // The layout of the leg that stages the whole buffer.
    virtual Layout staging_layout() const = 0;
    // All bytes before `offset` in the buffer have been staged.
    virtual void staged_up_to(uint64_t offset) noexcept = 0;
    // The leg has ended: the whole buffer has been staged, or the job is stopping.
    virtual void staging_ended() noexcept = 0;
    // Tells where the bytes belong. Called once, before or after the bytes have been staged. Calls
    // job->end_work() once: when all bytes are in their places, or when the job is stopping and no
    // copy from here is under way.
    virtual void place(std::shared_ptr<Job> job, Layout &&layout) noexcept = 0;
};

} // namespace kvf
