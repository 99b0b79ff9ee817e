#include "crew.h"

namespace kvf {

Crew::~Crew() {
    {
        std::lock_guard lock(mutex_);
        stopping_ = true;
        work_.notify_all();
    }
    for (auto &thread : crew_) thread.join();
}

void Crew::add(std::function<void()> task) {
    std::lock_guard lock(mutex_);
    if (crew_.empty()) {
        for (uint32_t i = 0; i < threads_; ++i) crew_.emplace_back([this] { run(); });
    }
    tasks_.push_back(std::move(task));
    work_.notify_one();
}

void Crew::run() {
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
