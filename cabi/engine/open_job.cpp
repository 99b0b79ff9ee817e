#include "engine/open_job.h"

#include <algorithm>

namespace kvf {
namespace {

std::shared_ptr<Job> make_job(Engine &engine, Submission &submission,
                              const kvf_submit_options &options) {
    JobResources resources;
    auto parts = std::move(submission.parts);
    if (parts.empty() && submission.buffer_bytes)
        parts.emplace_back(submission.buffer, submission.buffer_bytes);
    const auto queue = options.queue ? find<Queue>(options.queue) : nullptr;
    if (options.flags & KVF_SUBMIT_EACH_BLOCK) {
        std::vector<uint64_t> sizes;
        for (const auto &part : parts) sizes.push_back(part.second);
        resources.blocks =
            std::make_unique<BlockReports>(std::move(sizes), queue, options.callback);
    }
    bool pinned = !parts.empty();
    for (size_t i = 0; i < parts.size(); ++i) {
        const auto &[buffer, bytes] = parts[i];
        auto use = use_memory(buffer, bytes);
        pinned &= (use && use->pinned()) ||
                  (engine.pinner() && engine.pinner()->is_pinned(buffer, bytes));
        if (resources.blocks) {
            resources.blocks->keep(i, std::move(use));
        } else if (use) {
            resources.memory.push_back(std::move(use));
        }
    }
    JobRequest request;
    request.direction = submission.direction;
    request.priority = options.priority;
    request.mode = submission.mode;
    request.buffer = submission.buffer;
    request.pinned = pinned;
    request.user_data = options.user_data;
    request.submitted_ns = submission.submitted_ns;
    request.attachment = submission.attachment;
    if (options.callback) resources.callback.push_back({options.callback, {}});
    if (queue) resources.queue = QueueReservation(queue);
    resources.gate = std::move(submission.gate);
    resources.keep_alive = std::move(submission.keep_alive);
    resources.on_end = std::move(submission.on_end);
    return std::make_shared<Job>(&engine, request, std::move(resources));
}

} // namespace

OpenJob::OpenJob(Engine &engine, Submission &&submission, const kvf_submit_options &options,
                 bool with_handle)
    : engine_(engine), job_(make_job(engine, submission, options)), with_handle_(with_handle) {
    if (with_handle_) publish(job_->handle, job_);
    try {
        // make_job() has moved other members of the submission into the job, but not on_entry.
        engine_.enter(*job_, submission.on_entry);
    } catch (...) {
        if (with_handle_) unpublish(job_->handle);
        throw;
    }
}

OpenJob::~OpenJob() {
    if (committed_) return;
    job_->discard();
    job_->cancel();
    for (const auto &leg : job_->legs()) leg->device.close(*leg);
    job_->end_work();
    job_->wait(KVF_FOREVER, nullptr);
    if (with_handle_) unpublish(job_->handle);
}

void OpenJob::add(uint32_t device, Layout &&layout) {
    if (layout.empty()) return;
    job_->expect(layout);
    if (Leg *leg = leg_on(device)) return leg->device.extend(*leg, std::move(layout));
    hand_over(make_leg(device, std::move(layout)));
}

void OpenJob::stage(uint32_t device, std::shared_ptr<LoadAhead> load_ahead) {
    Leg &leg = make_leg(device, load_ahead->staging_layout());
    leg.parts.close();
    leg.load_ahead = std::move(load_ahead);
    hand_over(leg);
}

void OpenJob::commit(Recorded &&recorded, kvf_job *handle) {
    // What may throw comes first.
    const size_t open = job_->legs().size();
    const Leg *const ahead = leg_with_load_ahead();
    const std::shared_ptr<LoadAhead> load_ahead = ahead ? ahead->load_ahead : nullptr;
    Parts staged;
    const std::vector<Leg *> complete = add_rest(std::move(recorded.layouts), staged);
    committed_ = true;
    job_->commit(recorded);
    if (handle) *handle = job_->handle;
    if (load_ahead) {
        job_->begin_work(); // the copies within the device
        load_ahead->place(job_, std::move(staged));
    }
    for (size_t i = 0; i < open; ++i) {
        Leg &leg = *job_->legs()[i];
        leg.device.close(leg);
    }
    for (Leg *leg : complete) hand_over(*leg);
    job_->end_work();
}

// Adds to legs what has not been added yet. Returns the new legs, which are complete. Where what is
// staged belongs is added to `staged`.
std::vector<Leg *> OpenJob::add_rest(Layouts &&layouts, Parts &staged) {
    std::vector<Leg *> complete;
    complete.reserve(layouts.size());
    for (auto &[device, layout] : layouts) {
        if (layout.empty()) continue;
        job_->expect(layout);
        Leg *const leg = leg_on(device);
        if (!leg) {
            complete.push_back(&make_leg(device, std::move(layout)));
        } else if (std::find(complete.begin(), complete.end(), leg) != complete.end()) {
            leg->parts.add(std::move(layout));
        } else if (leg->load_ahead) {
            staged.add(std::move(layout));
        } else {
            leg->device.extend(*leg, std::move(layout));
        }
    }
    for (Leg *leg : complete) leg->parts.close();
    return complete;
}

Leg *OpenJob::leg_on(uint32_t device) const {
    for (const auto &leg : job_->legs()) {
        if (leg->device.index == device) return leg.get();
    }
    return nullptr;
}

const Leg *OpenJob::leg_with_load_ahead() const {
    for (const auto &leg : job_->legs()) {
        if (leg->load_ahead) return leg.get();
    }
    return nullptr;
}

Leg &OpenJob::make_leg(uint32_t device, Layout &&layout) {
    auto leg = std::make_unique<Leg>(engine_.device(device), job_->request.direction);
    leg->parts.add(std::move(layout));
    return job_->add_leg(std::move(leg));
}

// From here on the leg is the device's until it has ended.
void OpenJob::hand_over(Leg &leg) {
    leg.job = job_;
    job_->begin_work();
    try {
        leg.device.submit(leg);
    } catch (const std::exception &error) {
        // A thread could not be started.
        job_->fail(KVF_ERR_SYSTEM, error.what());
        leg.parts.cut_short();
        job_->leg_ended(leg);
    }
    // The job fails here, or in the device if that is lost. Its legs on other devices may follow a
    // stream: they end now.
    if (job_->stopping()) job_->cut_short();
}

std::shared_ptr<Job> submit_job(Engine &engine, Submission &&submission, Recorded &&recorded,
                                const kvf_submit_options &options, kvf_job *handle) {
    OpenJob open(engine, std::move(submission), options, handle != nullptr);
    open.commit(std::move(recorded), handle);
    return open.job();
}

} // namespace kvf
