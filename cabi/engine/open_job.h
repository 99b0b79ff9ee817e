// How a submission becomes a job: at once, or part by part while the submitting call still records.
#pragma once

#include "engine/engine.h"
#include "engine/submission.h"

namespace kvf {

// A job in flight whose submitting call still records what it consists of. Every part that is added
// moves at once.
class OpenJob {
public:
    // Starts the job. Its handle can be found from now on if `with_handle`. Throws KVF_ERR_CLOSED,
    // KVF_ERR_INVALID_HANDLE for the queue, and what `submission.on_entry` throws; then there is no
    // job. The buffer has been checked before: memory/buffer_checks.h.
    OpenJob(Engine &engine, Submission &&submission, const kvf_submit_options &options,
            bool with_handle);
    // Ends a job that was not committed: waits for the pieces under way, and nobody is told.
    ~OpenJob();
    OpenJob(const OpenJob &) = delete;
    OpenJob &operator=(const OpenJob &) = delete;

    const std::shared_ptr<Job> &job() const { return job_; }

    void add(uint32_t device, Layout &&layout);
    // Stages the buffer on the device, ahead of its layout: what is committed for that device is
    // copied from there.
    void stage(uint32_t device, std::shared_ptr<LoadAhead> load_ahead);
    // Nothing will be added: the job will complete. Where this throws, the job will not.
    void commit(Recorded &&recorded, kvf_job *handle);

private:
    Leg &make_leg(uint32_t device, Layout &&layout);
    Leg *leg_on(uint32_t device) const;
    const Leg *leg_with_load_ahead() const;
    std::vector<Leg *> add_rest(Layouts &&layouts, Parts &staged);
    void hand_over(Leg &leg);

    Engine &engine_;
    const std::shared_ptr<Job> job_;
    const bool with_handle_;
    bool committed_ = false;
};

// Starts a job that is known in full. The handle is published only if `handle` is not NULL.
std::shared_ptr<Job> submit_job(Engine &engine, Submission &&submission, Recorded &&recorded,
                                const kvf_submit_options &options, kvf_job *handle);

} // namespace kvf
