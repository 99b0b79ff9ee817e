#include "core/crew.h"

#include <system_error>

#include "core/thread.h"

namespace kvf {

void Crew::stop() {
    std::vector<std::thread> crew;
    {
        std::lock_guard lock(mutex_);
        stopping_ = true;
        work_.notify_all();
        crew.swap(crew_);
    }
    for (auto &thread : crew) thread.join();
}

void Crew::add(std::function<void()> task) {
    {
        std::lock_guard lock(mutex_);
        try {
            crew_.reserve(threads_); // a thread that has been started must find its place
            while (!stopping_ && crew_.size() < threads_) {
                crew_.push_back(start_thread([this] { run(); }));
            }
        } catch (const std::system_error &) {
            // The system refuses threads: those that there are do it, or else the caller.
        }
        if (!crew_.empty()) {
            tasks_.push_back(std::move(task));
            work_.notify_one();
            return;
        }
    }
    task();
}

void Crew::run() {
    name_thread("kvf-copy");
    std::unique_lock lock(mutex_);
    for (;;) {
        work_.wait(lock, [this] { return stopping_ || !tasks_.empty(); });
        if (tasks_.empty()) return;
        auto task = std::move(tasks_.front());
        tasks_.pop_front();
        lock.unlock();
        task();
        task = nullptr; // what it holds is let go before the next wait
        lock.lock();
    }
}

} // namespace kvf
