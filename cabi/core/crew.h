// A few threads that do one task after another.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace kvf {

class Crew {
public:
    explicit Crew(uint32_t threads) : threads_(threads) {}
    ~Crew() { stop(); }
    Crew(const Crew &) = delete;
    Crew &operator=(const Crew &) = delete;

    // The threads are started with the first task. Tasks must not throw.
    void add(std::function<void()> task);
    // Ends the threads when everything has been done; tasks that come later are done by who adds them.
    void stop();

private:
    void run();

    const uint32_t threads_;
    std::mutex mutex_;
    std::condition_variable work_;
    std::deque<std::function<void()>> tasks_;
    bool stopping_ = false;
    std::vector<std::thread> crew_;
};

} // namespace kvf
