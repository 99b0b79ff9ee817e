#include "jobs/job.h"

#include <algorithm>
#include <chrono>
#include <new>
#include <thread>
#include <utility>

namespace kvf {

Job::Job(JobOwner *owner, const JobRequest &request, JobResources &&resources)
    : request(request), owner_(owner),
      weak_owner_(owner ? owner->weak_from_this() : std::weak_ptr<JobOwner>()),
      resources_(std::move(resources)) {}

bool Job::enter(State next) noexcept {
    State now = state_.load(std::memory_order_relaxed);
    while (now < next) {
        if (state_.compare_exchange_weak(now, next, std::memory_order_acq_rel)) return true;
    }
    return false;
}

void Job::cancel() {
    fail(KVF_ERR_CANCELLED, "");
    cut_short();
}

void Job::fail(int32_t status, const std::string &detail) {
    std::lock_guard lock(mutex_);
    if (!enter(State::Stopping)) return;
    status_ = status;
    try {
        detail_ = detail;
    } catch (const std::bad_alloc &) {
        // The status alone must do.
    }
}

void Job::cut_short() {
    for (size_t i = 0; Leg *found = leg(i); ++i) found->device.cut_short(*found);
}

void Job::wait_for_gate() const {
    while (gate() && !gate()->is_open() && !stopping()) std::this_thread::sleep_for(Gate::kPoll);
}

void Job::note_started(uint64_t ns) {
    uint64_t none = 0;
    started_ns_.compare_exchange_strong(none, ns, std::memory_order_relaxed);
}

void Job::mark_buffer_lost() {
    for (const auto &use : resources_.memory) use->mark_lost();
    if (resources_.blocks) resources_.blocks->mark_lost();
}

Leg &Job::add_leg(std::unique_ptr<Leg> leg) {
    std::lock_guard lock(mutex_);
    devices_ |= device_set(leg->device.index);
    return *legs_.emplace_back(std::move(leg));
}

Leg *Job::leg(size_t index) {
    std::lock_guard lock(mutex_);
    return index < legs_.size() ? legs_[index].get() : nullptr;
}

void Job::commit(const JobRecord &record) noexcept {
    record_ = record;
    enter(State::Moving); // unless it is stopping
    if (!resources_.blocks) return;
    for (size_t block = 0; block < resources_.blocks->count(); ++block) {
        if (resources_.blocks->seal(block)) tell_of_block(block);
    }
}

void Job::count_moved(std::span<const Piece> pieces) {
    for (const Piece &piece : pieces) {
        if (resources_.blocks->moved(piece.block, piece.bytes)) tell_of_block(piece.block);
    }
}

void Job::tell_of_block(size_t block) {
    kvf_completion completion = begin_completion();
    completion.kind = KVF_COMPLETION_BLOCK;
    completion.block = static_cast<uint32_t>(block);
    completion.status = KVF_OK;
    completion.bytes = resources_.blocks->size(block);
    resources_.blocks->tell(block, completion, *owner_);
}

void Job::leg_ended(Leg &leg) {
    const std::shared_ptr<Job> alive = std::move(leg.job);
    if (const std::shared_ptr<LoadAhead> load_ahead = leg.load_ahead) load_ahead->staging_ended();
    end_work();
}

void Job::end_work() {
    if (work_.fetch_sub(1, std::memory_order_acq_rel) == 1) end();
}

// The order matters: whoever sees the completion may free the buffer and destroy the queue; the
// engine is told last, because it may be gone right afterwards.
void Job::end() {
    const auto alive = shared_from_this(); // the submitter's references may go with the completion
    make_completion();
    release_resources();
    Callbacks callback;
    if (!discarded_) callback.swap(resources_.callback);
    if (!callback.empty()) callback.front().completion = completion_;
    show_end();
    resources_.queue.reset();
    if (!callback.empty()) owner_->dispatch(std::move(callback));
    owner_->job_ended(*this);
}

// What the completions of the job and of its blocks have in common.
kvf_completion Job::begin_completion() const {
    kvf_completion completion{};
    completion.job = handle;
    completion.user_data = request.user_data;
    completion.mode = record_.mode.value_or(request.mode);
    completion.submitted_ns = request.submitted_ns;
    completion.started_ns = started_ns_.load(std::memory_order_relaxed);
    completion.finished_ns = now_ns();
    completion.listed_ns = record_.listed_ns;
    completion.recorded_ns = record_.recorded_ns;
    return completion;
}

void Job::make_completion() {
    std::lock_guard lock(mutex_);
    enter(State::Ending); // from here on cancel() and fail() come too late
    completion_ = begin_completion();
    completion_.kind = KVF_COMPLETION_JOB;
    completion_.status = status_;
    completion_.bytes = record_.bytes;
    completion_.fragments = record_.fragments;
    completion_.segments = record_.segments;
    copy_text(detail_, completion_.detail, sizeof completion_.detail);
}

void Job::release_resources() {
    if (resources_.on_end) resources_.on_end(completion_.status);
    resources_.on_end = nullptr;
    resources_.memory.clear();
    if (resources_.blocks) resources_.blocks->end();
    for (const auto &leg : legs_) leg->load_ahead.reset();
    resources_.keep_alive.clear();
    resources_.gate.reset();
}

// Under one lock: whoever has taken the completion from the queue finds that the job has ended.
void Job::show_end() {
    std::lock_guard lock(mutex_);
    if (discarded_) {
        resources_.queue.cancel();
    } else {
        resources_.queue.push(completion_);
    }
    enter(State::Ended);
    for (auto *word : words_) word->store(1, std::memory_order_release);
    ended_.notify_all();
}

void Job::signal_at_end(const std::vector<std::atomic<uint32_t> *> &words) {
    std::lock_guard lock(mutex_);
    if (state_ == State::Ended) {
        for (auto *word : words) word->store(1, std::memory_order_release);
    } else {
        words_.insert(words_.end(), words.begin(), words.end());
    }
}

bool Job::ended(kvf_completion *completion) {
    std::lock_guard lock(mutex_);
    if (state_ != State::Ended) return false;
    if (completion) *completion = completion_;
    return true;
}

bool Job::wait(int64_t timeout_ns, kvf_completion *completion) {
    std::unique_lock lock(mutex_);
    const auto done = [this] { return state_ == State::Ended; };
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
