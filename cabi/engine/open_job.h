// How a submission becomes a job: at once, or piece by piece while the submitting call still records.
#pragma once

#include "engine/engine.h"
#include "engine/submission.h"

namespace kvf {

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

// Lets a job in that is known in full, and starts it. The handle is published only if `handle` is not NULL.
std::shared_ptr<Job> submit_job(Engine &engine, Submission &&submission, Recorded &&recorded,
                                const kvf_submit_options &options, kvf_job *handle);

} // namespace kvf
