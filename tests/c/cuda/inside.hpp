// What the tests of the CUDA path share that use the library's objects: an engine, submissions, and
// the ends of jobs.
#pragma once

#include "cuda.hpp"
#include "engine/open_job.h"
#include "memory/layout_builder.h"

inline std::shared_ptr<kvf::Engine> make_cuda_engine(uint32_t copy_threads = 0) {
    kvf_engine_options options = KVF_ENGINE_OPTIONS_INIT;
    options.devices = KVF_DEVICES_CUDA;
    options.copy_threads = copy_threads;
    return std::make_shared<kvf::Engine>(options);
}

inline kvf_submit_options options_of(uint32_t priority) {
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.priority = priority;
    return options;
}

inline kvf::Submission make_submission(kvf::Direction direction, unsigned char *buffer,
                                       uint64_t bytes) {
    kvf::Submission submission;
    submission.direction = direction;
    submission.buffer = buffer;
    submission.buffer_bytes = bytes;
    return submission;
}
inline kvf::Submission make_submission(Way way, unsigned char *buffer, uint64_t bytes) {
    return make_submission(way == Way::Save ? kvf::Direction::Save : kvf::Direction::Load, buffer,
                           bytes);
}

inline kvf::Recorded make_recorded(uint32_t device, kvf::Layout &&layout) {
    kvf::Recorded recorded;
    recorded.layouts.emplace_back(device, std::move(layout));
    return recorded;
}

inline kvf_completion finish(const std::shared_ptr<kvf::Job> &job,
                             int64_t timeout_ns = 60 * SECONDS) {
    kvf_completion completion;
    CHECK(job->wait(timeout_ns, &completion));
    return completion;
}

// As finish(), for a job that must end well.
inline void succeed(const std::shared_ptr<kvf::Job> &job, int64_t timeout_ns = 60 * SECONDS) {
    CHECK_OK(finish(job, timeout_ns).status);
}

// Saves what a snapshot of device 1 holds, and waits for the end.
inline void save_snapshot(kvf::Engine &engine, kvf::Device::Snapshot &&snapshot,
                          const Buffer &buffer, int64_t timeout_ns = 60 * SECONDS) {
    kvf::Submission submission = make_submission(Way::Save, buffer.data(), buffer.bytes());
    submission.keep_alive.push_back(std::move(snapshot.memory));
    succeed(kvf::submit_job(engine, std::move(submission),
                            make_recorded(1, std::move(snapshot.layout)), KVF_SUBMIT_OPTIONS_INIT,
                            nullptr),
            timeout_ns);
}
