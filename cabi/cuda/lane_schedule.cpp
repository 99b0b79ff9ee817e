#include "cuda/lane_schedule.h"

#include <algorithm>
#include <chrono>

#include "memory/idle.h"

namespace kvf {
namespace {

// How long a pump stays awake for a leg that has been announced.
constexpr uint64_t kExpectNs = 500'000;
// The time between two questions to the streams that legs follow.
constexpr uint64_t kLeastStreamSleepNs = 20'000, kMostStreamSleepNs = 1'000'000;

} // namespace

void CudaLaneSchedule::extend(Leg &leg, Layout &&part) {
    std::lock_guard lock(mutex_);
    legs_.extend(leg, std::move(part));
    ++additions_;
    work_.notify_one();
}

void CudaLaneSchedule::announce() {
    std::lock_guard lock(mutex_);
    expected_until_ns_ = now_ns() + kExpectNs;
    work_.notify_one();
}

void CudaLaneSchedule::stop() {
    std::lock_guard lock(mutex_);
    stopping_ = true;
    work_.notify_one();
}

void CudaLaneSchedule::host_copy_ended(std::atomic<bool> &flag) {
    std::lock_guard lock(mutex_);
    flag.store(true, std::memory_order_release);
    host_copy_ended_ = true;
    work_.notify_one();
}

std::unique_lock<std::mutex> CudaLaneSchedule::look() {
    std::unique_lock lock(mutex_);
    seen_additions_ = additions_;
    follows_streams_ =
        legs_.has_following(KVF_PRIORITY_URGENT) || legs_.has_following(KVF_PRIORITY_BACKGROUND);
    return lock;
}

uint64_t CudaLaneSchedule::bytes_taken(const Leg &leg) {
    std::lock_guard lock(mutex_);
    return leg.parts.bytes() - leg.parts.left();
}

bool CudaLaneSchedule::ask_streams(bool is_moving) {
    if (!follows_streams_) return false;
    const uint64_t begin_ns = now_ns();
    if (is_moving && begin_ns - asked_ns_ < kLeastStreamSleepNs) return false;
    bool admitted = false;
    for (const uint32_t priority : {KVF_PRIORITY_URGENT, KVF_PRIORITY_BACKGROUND}) {
        GateCheck check;
        {
            std::lock_guard lock(mutex_);
            if (legs_.next_gates(priority, check)) all_asked_[priority] = true;
        }
        check.run();
        std::lock_guard lock(mutex_);
        admitted |= legs_.admit(priority, check);
    }
    asked_ns_ = now_ns();
    asking_ns_ = is_moving ? 0 : asking_ns_ + (asked_ns_ - begin_ns);
    return admitted;
}

void CudaLaneSchedule::wait_for_host_copy() {
    std::unique_lock lock(mutex_);
    work_.wait_for(lock, std::chrono::milliseconds(1), [this] { return host_copy_ended_; });
    host_copy_ended_ = false;
}

void CudaLaneSchedule::wait_for_addition(uint64_t ns) {
    std::unique_lock lock(mutex_);
    work_.wait_for(lock, std::chrono::nanoseconds(ns), [this] { return has_additions(); });
}

CudaLaneSchedule::Next CudaLaneSchedule::wait(bool may_rest) {
    std::unique_lock lock(mutex_);
    if (!legs_.empty()) {
        wait_for_streams(lock);
        return Next::Look;
    }
    gated_since_ns_ = 0;
    if (stopping_) return Next::End;
    const auto is_expected = [this] { return now_ns() < expected_until_ns_; };
    if (is_expected()) return Next::Spin;
    const auto is_wanted = [&] { return stopping_ || !legs_.empty() || is_expected(); };
    if (!may_rest) {
        work_.wait(lock, is_wanted);
    } else if (!work_.wait_for(lock, std::chrono::nanoseconds(idle_ns()), is_wanted)) {
        return Next::Rest;
    }
    return Next::Look;
}

// No leg can begin: each is still being recorded, or follows a stream that is not done. A recording
// announces its parts. A stream announces nothing, so the pump asks it, less and less often: each
// sleep is an eighth of the wait so far, within limits. The sleep is at least as long as asking
// took, so that asking takes half of the pump's time at most.
void CudaLaneSchedule::wait_for_streams(std::unique_lock<std::mutex> &lock) {
    if (follows_streams_ && !(all_asked_[0] && all_asked_[1]))
        return; // the other streams are asked first
    const uint64_t now = now_ns();
    if (!gated_since_ns_) gated_since_ns_ = now;
    const uint64_t waited_ns = now - gated_since_ns_;
    const uint64_t sleep_ns =
        std::max(std::clamp(waited_ns / 8, kLeastStreamSleepNs, kMostStreamSleepNs), asking_ns_);
    const auto is_wanted = [this] { return stopping_ || has_additions(); };
    if (work_.wait_for(lock, std::chrono::nanoseconds(sleep_ns), is_wanted)) gated_since_ns_ = 0;
    all_asked_ = {};
    asking_ns_ = 0;
}

} // namespace kvf
