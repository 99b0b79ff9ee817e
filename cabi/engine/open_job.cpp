#include "engine/open_job.h"

namespace kvf {
namespace {

// Of a job that does not come about. A thread that guessed the number may have released the handle.
void withdraw_handle(const Job &job) noexcept {
    try {
        withdraw<Job>(job.handle);
    } catch (const Error &) {
        // Nobody finds it any more: that is all that is wanted.
    }
}

} // namespace

OpenJob::OpenJob(Engine &engine, Submission &&submission, const kvf_submit_options &options,
                 bool with_handle)
    : engine_(engine), job_(engine.make_job(submission, options)), with_handle_(with_handle) {
    if (with_handle_) publish(job_->handle, job_);
    try {
        engine_.enter(job_, options.queue, submission.on_entry);
    } catch (...) {
        if (with_handle_) withdraw_handle(*job_);
        throw;
    }
}

OpenJob::~OpenJob() {
    if (committed_) return;
    job_->retract();
    engine_.cancel(*job_);
    for (const auto &leg : job_->legs) engine_.device(leg->device).finish(*leg);
    job_->let_go();
    job_->wait(KVF_FOREVER, nullptr);
    if (with_handle_) withdraw_handle(*job_);
}

void OpenJob::add(uint32_t device, Layout &&layout) {
    if (layout.empty()) return;
    if (Leg *leg = leg_on(device)) return engine_.device(device).extend(*leg, std::move(layout));
    hand_over(make_leg(device, std::move(layout)));
}

void OpenJob::stage(uint32_t device, std::shared_ptr<LoadAhead> load_ahead) {
    Leg &leg = make_leg(device, load_ahead->staging_layout());
    leg.parts.close();
    leg.load_ahead = std::move(load_ahead);
    hand_over(leg);
}

void OpenJob::commit(Recorded &&recorded, kvf_job *handle) {
    job_->bytes = recorded.bytes;
    job_->fragments = recorded.fragments;
    job_->segments = recorded.segments;
    job_->listed_ns = recorded.listed_ns;
    job_->recorded_ns = recorded.recorded_ns;
    // What may throw comes first.
    std::vector<Leg *> complete;
    complete.reserve(recorded.layouts.size());
    const size_t open = job_->legs.size();
    std::shared_ptr<LoadAhead> load_ahead;
    for (const auto &leg : job_->legs) {
        if (leg->load_ahead) load_ahead = leg->load_ahead;
    }
    Layout staged;
    for (auto &[device, layout] : recorded.layouts) {
        if (layout.empty()) continue;
        if (Leg *leg = leg_on(device)) {
            if (leg->load_ahead) {
                staged = std::move(layout);
                continue;
            }
            engine_.device(device).extend(*leg, std::move(layout));
            continue;
        }
        complete.push_back(&make_leg(device, std::move(layout)));
        complete.back()->parts.close();
    }
    committed_ = true;
    if (handle) *handle = job_->handle;
    if (load_ahead) {
        job_->expect_leg(); // the copies within the device hold the job as a leg does
        load_ahead->place(job_, std::move(staged));
    }
    for (size_t i = 0; i < open; ++i) engine_.device(job_->legs[i]->device).finish(*job_->legs[i]);
    for (Leg *leg : complete) hand_over(*leg);
    job_->let_go();
}

Leg *OpenJob::leg_on(uint32_t device) const {
    for (const auto &leg : job_->legs) {
        if (leg->device == device) return leg.get();
    }
    return nullptr;
}

Leg &OpenJob::make_leg(uint32_t device, Layout &&layout) {
    auto leg = std::make_unique<Leg>(device, job_->direction);
    leg->parts.add(std::move(layout));
    return job_->add_leg(std::move(leg));
}

// From here on the leg is the device's until it has ended.
void OpenJob::hand_over(Leg &leg) {
    leg.job = job_;
    job_->expect_leg();
    try {
        engine_.device(leg.device).submit(leg);
    } catch (const std::exception &error) {
        // A thread could not be started.
        job_->fail(KVF_ERR_SYSTEM, error.what());
        leg.parts.cut_short();
        job_->leg_ended(leg);
    }
    // The job fails here, or in the device if that is lost. Its legs on other devices may follow a stream: they end now.
    if (job_->stopping()) engine_.stop(*job_);
}

std::shared_ptr<Job> submit_job(Engine &engine, Submission &&submission, Recorded &&recorded,
                                const kvf_submit_options &options, kvf_job *handle) {
    OpenJob open(engine, std::move(submission), options, handle != nullptr);
    open.commit(std::move(recorded), handle);
    return open.job();
}

} // namespace kvf
