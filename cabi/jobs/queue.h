// The completion queue: a list under a lock, with an eventfd that is readable while it is not
// empty.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>

#include "core/handle.h"

namespace kvf {

class Queue final : public Object {
public:
    static constexpr ObjectType kType = ObjectType::Queue;

    Queue();
    ~Queue() override;

    int fd() const { return fd_; }

    uint32_t take(void *completions, uint64_t stride, uint32_t capacity, int64_t timeout_ns);
    void wake();
    // False while places are reserved. Afterwards take() returns at once.
    bool close();

private:
    friend class QueueReservation;

    void reserve();
    void cancel_reservation() noexcept;
    void push(const kvf_completion &completion) noexcept;
    void signal();
    void unsignal();

    std::mutex mutex_;
    std::condition_variable changed_;
    std::list<kvf_completion> completions_;
    std::list<kvf_completion> reserved_; // places for those to come
    std::list<kvf_completion> spare_;    // places that have been used
    uint64_t wakes_ = 0;                 // that no take() has returned for yet
    bool closed_ = false;
    int fd_ = -1;
};

// The place of one completion in a queue, reserved before its job starts: push() then cannot fail,
// and the queue cannot be destroyed meanwhile. A place that nothing was pushed into is free again
// when its reservation goes.
class QueueReservation {
public:
    QueueReservation() = default; // in no queue
    // Throws KVF_ERR_INVALID_HANDLE for a queue that is being destroyed.
    explicit QueueReservation(std::shared_ptr<Queue> queue);
    QueueReservation(QueueReservation &&other) noexcept { swap(other); }
    QueueReservation &operator=(QueueReservation &&other) noexcept {
        swap(other);
        return *this;
    }
    ~QueueReservation() { cancel(); }

    // One of these is called, once. Without a queue neither does anything.
    void push(const kvf_completion &completion) noexcept;
    void cancel() noexcept;
    // Afterwards the reservation no longer keeps the queue alive.
    void reset() noexcept;

private:
    void swap(QueueReservation &other) noexcept {
        queue_.swap(other.queue_);
        std::swap(pending_, other.pending_);
    }

    std::shared_ptr<Queue> queue_;
    bool pending_ = false; // the place is still reserved
};

} // namespace kvf
