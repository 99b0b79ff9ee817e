// The thread that calls completion callbacks.
#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>

#include "jobs/owner.h"

namespace kvf {

class Dispatcher {
public:
    // Starts the thread if it does not run yet. Throws std::system_error.
    void start();
    // Has the callbacks called, one after another. The thread has been started.
    void add(Callbacks &&callbacks);
    // Ends the thread when all callbacks have been called.
    void stop();
    // The caller is a completion callback: it must not wait for what needs callbacks to go on.
    bool is_this_thread() const;

private:
    void run();

    std::mutex mutex_;
    std::condition_variable work_;
    Callbacks callbacks_;
    bool stopping_ = false;
    std::thread thread_;
};

} // namespace kvf
