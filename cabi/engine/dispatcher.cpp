#include "engine/dispatcher.h"

#include "core/thread.h"

namespace kvf {
namespace {

thread_local const Dispatcher *dispatcher_here = nullptr; // whose thread this is

} // namespace

void Dispatcher::start() {
    std::lock_guard lock(mutex_);
    if (!thread_.joinable()) thread_ = start_thread([this] { run(); });
}

void Dispatcher::add(Callbacks &&callbacks) {
    std::lock_guard lock(mutex_);
    callbacks_.splice(callbacks_.end(), callbacks);
    work_.notify_one();
}

void Dispatcher::stop() {
    {
        std::lock_guard lock(mutex_);
        stopping_ = true;
        work_.notify_all();
    }
    if (thread_.joinable()) thread_.join();
}

bool Dispatcher::is_this_thread() const { return dispatcher_here == this; }

void Dispatcher::run() {
    dispatcher_here = this;
    name_thread("kvf-dispatch");
    std::unique_lock lock(mutex_);
    for (;;) {
        work_.wait(lock, [this] { return stopping_ || !callbacks_.empty(); });
        if (callbacks_.empty()) return;
        Callbacks next;
        next.splice(next.end(), callbacks_, callbacks_.begin());
        lock.unlock();
        next.front().function(&next.front().completion);
        lock.lock();
    }
}

} // namespace kvf
