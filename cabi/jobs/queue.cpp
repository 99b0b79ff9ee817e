#include "jobs/queue.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <utility>

namespace kvf {
namespace {

constexpr size_t kMostSpare = 1024; // more is memory that nobody may want again

} // namespace

Queue::Queue() : fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    if (fd_ < 0) throw Error(KVF_ERR_SYSTEM, format("eventfd: %s", std::strerror(errno)));
}

Queue::~Queue() { ::close(fd_); }

void Queue::signal() {
    const uint64_t one = 1;
    // EAGAIN would mean that it is readable already, which is all that is wanted.
    [[maybe_unused]] ssize_t n = ::write(fd_, &one, sizeof one);
}

void Queue::unsignal() {
    uint64_t count;
    // Does not block, since the descriptor is EFD_NONBLOCK.
    // NOLINTNEXTLINE(clang-analyzer-unix.BlockInCriticalSection)
    [[maybe_unused]] ssize_t n = ::read(fd_, &count, sizeof count);
}

void Queue::reserve() {
    std::lock_guard lock(mutex_);
    if (closed_) throw Error(KVF_ERR_INVALID_HANDLE, "the queue has been destroyed");
    // The memory for the completion is taken now: it must not be missing when the job has ended.
    if (spare_.empty()) spare_.emplace_back();
    reserved_.splice(reserved_.end(), spare_, spare_.begin());
}

void Queue::cancel_reservation() noexcept {
    std::lock_guard lock(mutex_);
    spare_.splice(spare_.end(), reserved_, reserved_.begin());
}

void Queue::push(const kvf_completion &completion) noexcept {
    std::lock_guard lock(mutex_);
    const bool was_empty = completions_.empty() && wakes_ == 0;
    reserved_.front() = completion;
    completions_.splice(completions_.end(), reserved_, reserved_.begin());
    if (was_empty) signal();
    changed_.notify_one();
}

uint32_t Queue::take(void *completions, uint64_t stride, uint32_t capacity, int64_t timeout_ns) {
    std::unique_lock lock(mutex_);
    const auto ready = [this] { return !completions_.empty() || wakes_ > 0 || closed_; };
    if (timeout_ns < 0) {
        changed_.wait(lock, ready);
    } else if (timeout_ns > 0) {
        timeout_ns = std::min(timeout_ns, kLongestTimeoutNs);
        changed_.wait_for(lock, std::chrono::nanoseconds(timeout_ns), ready);
    }
    if (!ready()) return 0;

    uint32_t n = 0;
    auto *out = static_cast<unsigned char *>(completions);
    for (; n < capacity && !completions_.empty(); ++n, out += stride) {
        copy_struct(completions_.front(), out, stride);
        if (spare_.size() < kMostSpare) {
            spare_.splice(spare_.end(), completions_, completions_.begin());
        } else {
            completions_.pop_front();
        }
    }
    // A take that found completions has not used up a wake: whoever sent it may wait for a take
    // that returns 0.
    if (n == 0 && wakes_ > 0) --wakes_;
    if (completions_.empty() && wakes_ == 0 && !closed_) {
        unsignal();
    } else {
        changed_.notify_one(); // what is left is for another thread that waits
    }
    return n;
}

void Queue::wake() {
    std::lock_guard lock(mutex_);
    if (completions_.empty() && wakes_ == 0) signal();
    ++wakes_;
    changed_.notify_one();
}

bool Queue::close() {
    std::lock_guard lock(mutex_);
    if (!reserved_.empty()) return false;
    closed_ = true;
    completions_.clear();
    signal();
    changed_.notify_all();
    return true;
}

QueueReservation::QueueReservation(std::shared_ptr<Queue> queue) : queue_(std::move(queue)) {
    queue_->reserve();
    pending_ = true;
}

void QueueReservation::push(const kvf_completion &completion) noexcept {
    if (std::exchange(pending_, false)) queue_->push(completion);
}

void QueueReservation::cancel() noexcept {
    if (std::exchange(pending_, false)) queue_->cancel_reservation();
}

void QueueReservation::reset() noexcept {
    cancel();
    queue_.reset();
}

} // namespace kvf
