#include "jobs/job.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <thread>

namespace kvf {
namespace {

constexpr std::chrono::microseconds kGatePoll{20};

} // namespace

bool Gate::is_open() {
    if (!was_open() && is_done()) open_.store(true, std::memory_order_release);
    return was_open();
}

void Gate::wait() {
    while (!is_open()) std::this_thread::sleep_for(kGatePoll);
}

void Job::cancel() { fail(KVF_ERR_CANCELLED, ""); }

void Job::fail(int32_t status, const std::string &detail) {
    std::lock_guard lock(mutex_);
    if (has_ended_ || status_ != KVF_OK) return; // the first reason stands
    status_ = status;
    stopping_.store(true, std::memory_order_release);
    try {
        detail_ = detail;
    } catch (const std::bad_alloc &) {
        // The status alone must do.
    }
}

void Job::wait_for_turn() const {
    while (gate && !gate->is_open() && !stopping()) std::this_thread::sleep_for(kGatePoll);
}

void Job::note_started(uint64_t ns) {
    uint64_t none = 0;
    started_ns_.compare_exchange_strong(none, ns, std::memory_order_relaxed);
}

Leg &Job::add_leg(std::unique_ptr<Leg> leg) {
    std::lock_guard lock(mutex_);
    devices |= device_set(leg->device);
    return *legs.emplace_back(std::move(leg));
}

Leg *Job::leg(size_t index) {
    std::lock_guard lock(mutex_);
    return index < legs.size() ? legs[index].get() : nullptr;
}

void Job::leg_ended(Leg &leg) {
    const std::shared_ptr<Job> alive = std::move(leg.job);
    if (const std::shared_ptr<LoadAhead> ahead = leg.load_ahead) ahead->staging_ended();
    let_go();
}

void Job::let_go() {
    if (holds_.fetch_sub(1, std::memory_order_acq_rel) == 1) end();
}

void Job::end() {
    const auto alive = shared_from_this(); // the submitter's references may go with the completion
    kvf_completion completion{};
    {
        std::lock_guard lock(mutex_);
        // From here on cancel() and fail() come too late.
        has_ended_ = true;
        completion.job = handle;
        completion.user_data = user_data;
        completion.status = status_;
        completion.mode = mode;
        completion.bytes = bytes;
        completion.fragments = fragments;
        completion.segments = segments;
        completion.submitted_ns = submitted_ns;
        completion.started_ns = started_ns_.load(std::memory_order_relaxed);
        completion.finished_ns = now_ns();
        completion.listed_ns = listed_ns;
        completion.recorded_ns = recorded_ns;
        copy_text(detail_, completion.detail, sizeof completion.detail);
        completion_ = completion;
    }
    if (on_end) on_end(completion.status);
    on_end = nullptr;
    memory.reset();
    for (const auto &leg : legs) leg->load_ahead.reset();
    keep.clear();
    gate.reset();
    JobOwner *const last = owner;
    // The order matters: whoever sees the completion may free the buffer and destroy the queue; the
    // engine is told last, because it may be gone right afterwards.
    Callbacks dispatched;
    if (!retracted_) dispatched.swap(callback);
    if (!dispatched.empty()) dispatched.front().completion = completion;
    {
        // Under one lock: whoever has taken it from the queue finds that the job has ended.
        std::lock_guard lock(mutex_);
        if (queue) retracted_ ? queue->give_up_reserved() : queue->push(completion);
        has_ended_visible_ = true;
        for (auto *word : words_) word->store(1, std::memory_order_release);
        ended_.notify_all();
    }
    queue.reset();
    if (!dispatched.empty()) last->dispatch(std::move(dispatched));
    last->job_ended(*this);
}

void Job::raise_at_end(const std::vector<std::atomic<uint32_t> *> &words) {
    std::lock_guard lock(mutex_);
    if (has_ended_visible_) {
        for (auto *word : words) word->store(1, std::memory_order_release);
    } else {
        words_.insert(words_.end(), words.begin(), words.end());
    }
}

bool Job::ended(kvf_completion *completion) {
    std::lock_guard lock(mutex_);
    if (!has_ended_visible_) return false;
    if (completion) *completion = completion_;
    return true;
}

bool Job::wait(int64_t timeout_ns, kvf_completion *completion) {
    std::unique_lock lock(mutex_);
    const auto done = [this] { return has_ended_visible_; };
    if (timeout_ns < 0) {
        ended_.wait(lock, done);
    } else {
        timeout_ns = std::min(timeout_ns, kLongestTimeoutNs);
        if (!ended_.wait_for(lock, std::chrono::nanoseconds(timeout_ns), done)) return false;
    }
    if (completion) *completion = completion_;
    return true;
}

} // namespace kvf
