// Gates: work of somebody else that a job must follow.
#pragma once

#include <atomic>
#include <chrono>

namespace kvf {

class Gate {
public:
    // A gate does not tell when it opens. Whoever waits for one asks again after this time.
    static constexpr std::chrono::microseconds kPoll{20};

    virtual ~Gate() = default;
    // True from the moment on when that work is done. Asks a driver, which takes microseconds: not
    // for callers that hold a lock. Any thread.
    bool is_open();
    // What is_open() last returned. Asks nobody.
    bool was_open() const { return open_.load(std::memory_order_acquire); }
    // Blocks until the gate is open.
    void wait();

private:
    virtual bool is_done() = 0;

    std::atomic<bool> open_{false};
};

} // namespace kvf
