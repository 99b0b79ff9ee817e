#include "crew.h"

#include <system_error>

#include "thread_name.h"

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
            while (!stopping_ && crew_.size() < threads_) crew_.emplace_back([this] { run(); });
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
