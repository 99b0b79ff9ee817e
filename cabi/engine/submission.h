// A submission on its way to becoming a job: what a submitting call knows beforehand, what it records, and
// the job while that is still going on.
#pragma once

#include "jobs/fences.h"
#include "jobs/job.h"

namespace kvf {

class Engine;

// What is known before anything is recorded.
struct Submission {
    Direction direction = Direction::Save;
    unsigned char *buffer = nullptr;
    uint64_t buffer_bytes = 0;
    uint32_t mode = 0;
    uint64_t submitted_ns = 0;
    const void *owned_by = nullptr;
    std::shared_ptr<Gate> gate;              // what it follows: Engine::make_gate()
    std::vector<std::shared_ptr<void>> keep; // until the job has ended
    std::function<void(int32_t)> on_end;
    std::shared_ptr<Fence> fence; // of a llama transfer: lowered at its end
    // Happens with the job's entry among those in flight; may throw, and then there is no job.
    std::function<void()> on_entry;
};

using Layouts = std::vector<std::pair<uint32_t, Layout>>; // device, layout

// What it has turned out to consist of.
struct Recorded {
    Layouts layouts;
    uint64_t bytes = 0; // these three for the completion
    uint64_t fragments = 0;
    uint64_t segments = 0;
    uint64_t listed_ns = 0;
    uint64_t recorded_ns = 0;
};

// A job in flight whose submitting call still records what it consists of. What is added moves at once.
class OpenJob {
public:
    // Lets the job in. Its handle can be found from now on if `with_handle`.
    OpenJob(Engine &engine, Submission &&submission, const kvf_submit_options &options,
            bool with_handle);
    // Takes the job back, unless it was committed: waits for the pieces under way, and nobody is told.
    ~OpenJob();
    OpenJob(const OpenJob &) = delete;
    OpenJob &operator=(const OpenJob &) = delete;

    const std::shared_ptr<Job> &job() const { return job_; }

    void add(uint32_t device, Layout &&layout);
    // Stages the buffer on the device, ahead of its layout: what is committed for that device is copied from there.
    void stage(uint32_t device, std::shared_ptr<LoadAhead> load_ahead);
    // This is all: the job will complete. Where it throws, it will not.
    void commit(Recorded &&recorded, kvf_job *handle);

private:
    Leg &make_leg(uint32_t device, Layout &&layout);
    Leg *leg_on(uint32_t device) const;
    void hand_over(Leg &leg);

    Engine &engine_;
    const std::shared_ptr<Job> job_;
    const bool with_handle_;
    bool committed_ = false;
};

} // namespace kvf
