#include "engine/jobs_in_flight.h"

#include <algorithm>

namespace kvf {

void JobsInFlight::check_open() const {
    std::lock_guard lock(mutex_);
    check_open_locked();
}

void JobsInFlight::check_open_locked() const {
    if (closed_) throw Error(KVF_ERR_CLOSED);
}

void JobsInFlight::leave(Job &job) noexcept {
    std::lock_guard lock(mutex_);
    jobs_.erase(&job);
    changed_.notify_all();
}

size_t JobsInFlight::count() const {
    std::lock_guard lock(mutex_);
    return jobs_.size();
}

void JobsInFlight::mark_cancelled(const Matches &matches) {
    std::lock_guard lock(mutex_);
    for (Job *job : jobs_) {
        if (matches(*job)) job->fail(KVF_ERR_CANCELLED, "");
    }
}

void JobsInFlight::wait(const Matches &matches) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] {
        return std::none_of(jobs_.begin(), jobs_.end(),
                            [&](const Job *job) { return matches(*job); });
    });
}

void JobsInFlight::attach() {
    std::lock_guard lock(mutex_);
    check_open_locked();
    ++attached_;
}

void JobsInFlight::detach() noexcept {
    std::lock_guard lock(mutex_);
    --attached_;
}

void JobsInFlight::close() {
    std::unique_lock lock(mutex_);
    if (closed_) throw Error(KVF_ERR_INVALID_HANDLE, "the engine is being destroyed");
    if (attached_) throw Error(KVF_ERR_BUSY, format("%u kvf_llama are attached", attached_));
    closed_ = true;
    changed_.wait(lock, [this] { return jobs_.empty(); });
}

} // namespace kvf
