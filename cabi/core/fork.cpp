#include "core/fork.h"

#include <pthread.h>

#include <mutex>
#include <vector>

namespace kvf {
namespace {

struct Handlers {
    std::function<void()> before, parent, child;
};

std::vector<Handlers> &handlers() {
    static auto *handlers = new std::vector<Handlers>;
    return *handlers;
}

std::mutex &handlers_mutex() {
    static auto *mutex = new std::mutex;
    return *mutex;
}

// As pthread_atfork() does: last registered, first locked.
void before() {
    handlers_mutex().lock();
    for (auto it = handlers().rbegin(); it != handlers().rend(); ++it) it->before();
}

void parent() {
    for (auto &h : handlers()) h.parent();
    handlers_mutex().unlock();
}

void child() {
    for (auto &h : handlers()) h.child();
    handlers_mutex().unlock();
}

} // namespace

void on_fork(std::function<void()> before_one, std::function<void()> parent_one,
             std::function<void()> child_one) {
    std::lock_guard lock(handlers_mutex());
    if (handlers().empty()) pthread_atfork(before, parent, child);
    handlers().push_back({std::move(before_one), std::move(parent_one), std::move(child_one)});
}

} // namespace kvf
