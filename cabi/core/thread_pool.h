// A few threads that do one task after another.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace kvf {

class ThreadPool {
public:
    explicit ThreadPool(uint32_t threads) : most_(threads) {}
    ~ThreadPool() { stop(); }
    ThreadPool(const ThreadPool &) = delete;
    ThreadPool &operator=(const ThreadPool &) = delete;

    // The threads are started with the first task. Where the system refuses them all, the caller
    // does the task. Tasks must not throw.
    void add(std::function<void()> task);
    // Ends the threads when every task is done. Whoever adds a task later does it.
    void stop();

private:
    void run();

    const uint32_t most_; // threads
    std::mutex mutex_;
    std::condition_variable work_;
    std::deque<std::function<void()>> tasks_;
    bool stopping_ = false;
    std::vector<std::thread> threads_;
};

} // namespace kvf
