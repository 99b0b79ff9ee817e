#include "core/thread_pool.h"

#include <system_error>

#include "core/thread.h"

namespace kvf {

void ThreadPool::stop() {
    std::vector<std::thread> threads;
    {
        std::lock_guard lock(mutex_);
        stopping_ = true;
        work_.notify_all();
        threads.swap(threads_);
    }
    for (auto &thread : threads) thread.join();
}

void ThreadPool::add(std::function<void()> task) {
    {
        std::lock_guard lock(mutex_);
        try {
            threads_.reserve(most_); // no thread that was started may be lost for want of memory
            while (!stopping_ && threads_.size() < most_) {
                threads_.push_back(start_thread([this] { run(); }));
            }
        } catch (const std::system_error &) {
            // The system refuses threads: those that there are do the task, or else the caller.
        }
        if (!threads_.empty()) {
            tasks_.push_back(std::move(task));
            work_.notify_one();
            return;
        }
    }
    task();
}

void ThreadPool::run() {
    name_thread("kvf-copy");
    std::unique_lock lock(mutex_);
    for (;;) {
        work_.wait(lock, [this] { return stopping_ || !tasks_.empty(); });
        if (tasks_.empty()) return;
        auto task = std::move(tasks_.front());
        tasks_.pop_front();
        lock.unlock();
        task();
        task = nullptr; // what the task holds is released before the next wait
        lock.lock();
    }
}

} // namespace kvf
