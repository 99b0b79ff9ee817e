// What stands in for functions that older systems lack does what those do. (This program is linked
// with the stand-ins.)
#include "core/old_symbols.h"

#include "check.hpp"

#include <dlfcn.h>
#include <sys/stat.h>

#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

timespec steady_time_in(std::chrono::nanoseconds wait) {
    timespec until;
    CHECK(clock_gettime(CLOCK_MONOTONIC, &until) == 0);
    const auto nanoseconds = std::chrono::nanoseconds(until.tv_nsec) + wait;
    until.tv_sec += std::chrono::floor<std::chrono::seconds>(nanoseconds).count();
    until.tv_nsec = (nanoseconds - std::chrono::floor<std::chrono::seconds>(nanoseconds)).count();
    return until;
}

int wait_by_wall_clock(std::condition_variable &condition, std::mutex &mutex,
                       std::chrono::nanoseconds wait) {
    const timespec until = steady_time_in(wait);
    return kvf::wait_by_wall_clock(condition.native_handle(), mutex.native_handle(),
                                   CLOCK_MONOTONIC, &until);
}

void a_wait_by_the_wall_clock_lasts_as_long_as_asked() {
    std::condition_variable condition;
    std::mutex mutex;
    const std::lock_guard lock(mutex);
    // Of the differences between the two clocks' fractions of a second, some carry and some borrow.
    for (const auto wait : {50ms, 300ms, 700ms}) {
        const auto begin = Clock::now();
        CHECK(wait_by_wall_clock(condition, mutex, wait) == ETIMEDOUT);
        CHECK(Clock::now() - begin >= wait - 5ms);
        CHECK(Clock::now() - begin < wait + 20s);
    }
    CHECK(wait_by_wall_clock(condition, mutex, -2s) == ETIMEDOUT);
}

void a_wait_by_the_wall_clock_ends_when_notified() {
    std::condition_variable condition;
    std::mutex mutex;
    bool ready = false;
    std::unique_lock lock(mutex);
    std::thread other([&] {
        const std::lock_guard lock(mutex);
        ready = true;
        condition.notify_one();
    });
    while (!ready) CHECK(wait_by_wall_clock(condition, mutex, 60s) == 0);
    lock.unlock();
    other.join();
}

void conditions_wait() {
    std::condition_variable condition;
    std::mutex mutex;
    std::unique_lock lock(mutex);
    const auto begin = Clock::now();
    CHECK(condition.wait_for(lock, 50ms) == std::cv_status::timeout);
    CHECK(Clock::now() - begin >= 50ms);
    bool ready = false;
    std::thread other([&] {
        CHECK(!mutex.try_lock() || (mutex.unlock(), true));
        const std::lock_guard lock(mutex);
        ready = true;
        condition.notify_one();
    });
    while (!ready) condition.wait(lock);
    lock.unlock();
    other.join();
}

struct Counted {
    static inline int alive = 0;
    Counted() { ++alive; }
    Counted(const Counted &) { ++alive; }
    ~Counted() { --alive; }
};

void an_exception_lives_as_long_as_something_points_to_it() {
    std::exception_ptr first;
    try {
        throw Counted();
    } catch (...) {
        first = std::current_exception();
    }
    {
        std::vector<std::exception_ptr> copies(3, first);
        CHECK(copies.back() == first);
        first = nullptr;
        CHECK(Counted::alive == 1);
        try {
            std::rethrow_exception(copies.front());
        } catch (const Counted &) {
            copies.resize(1);
        }
        CHECK(Counted::alive == 1);
    }
    CHECK(Counted::alive == 0);
}

void an_array_of_no_possible_length_is_refused() {
    volatile long length = -1;
    try {
        delete[] new int[length];
    } catch (const std::bad_array_new_length &) {
        return;
    }
    CHECK(!"refused");
}

void files_and_libraries_are_found() {
    struct stat found;
    CHECK(stat("/proc/self/exe", &found) == 0 && S_ISREG(found.st_mode) && found.st_size > 0);
    CHECK(stat("/nowhere", &found) == -1 && errno == ENOENT);

    void *const runtime = dlopen("libstdc++.so.6", RTLD_NOW);
    CHECK(runtime && dlsym(runtime, "__cxa_throw"));
    CHECK(!dlsym(runtime, "kvf_nothing") && dlerror());
    CHECK(dlclose(runtime) == 0);
}

} // namespace

int main() {
    a_wait_by_the_wall_clock_lasts_as_long_as_asked();
    a_wait_by_the_wall_clock_ends_when_notified();
    conditions_wait();
    an_exception_lives_as_long_as_something_points_to_it();
    an_array_of_no_possible_length_is_refused();
    files_and_libraries_are_found();
}
