// The completion queue: a list under a lock, with an eventfd that is readable while it is not empty.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <list>
#include <mutex>

#include "core/handle.h"

namespace kvf {

class Queue final : public Object {
public:
    static constexpr ObjectType kType = ObjectType::Queue;

    Queue();
    ~Queue() override;

    int fd() const { return fd_; }

    // A job that will complete into this queue reserves its place first: push() then cannot fail, and
    // a queue with places reserved cannot be destroyed.
    void reserve();
    void give_up_reserved();
    void push(const kvf_completion &completion) noexcept;

    uint32_t take(void *completions, uint64_t stride, uint32_t capacity, int64_t timeout_ns);
    void wake();
    // False while places are reserved. Afterwards take() returns at once.
    bool close();

private:
    void signal();
    void unsignal();

    std::mutex mutex_;
    std::condition_variable arrived_;
    std::list<kvf_completion> completions_;
    std::list<kvf_completion> reserved_; // places for those to come
    std::list<kvf_completion> spare_;    // places that have been used
    uint64_t wakes_ = 0;                 // that no take() has returned for yet
    bool closed_ = false;
    int fd_ = -1;
};

} // namespace kvf
