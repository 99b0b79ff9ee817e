// Threads of the library's own: how they are started, and their names.
#pragma once

#include <pthread.h>

#include <csignal>
#include <cstdio>
#include <thread>
#include <utility>

namespace kvf {

// Blocks signals on the calling thread while it lives; threads that are started meanwhile inherit
// that. Not those of a thread's own faults, which go to no other thread: handlers that report
// crashes work on every thread.
class SignalsBlocked {
public:
    SignalsBlocked() {
        sigset_t all;
        sigfillset(&all);
        for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS}) {
            sigdelset(&all, fault);
        }
        pthread_sigmask(SIG_BLOCK, &all, &before_);
    }
    ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
    SignalsBlocked(const SignalsBlocked &) = delete;
    SignalsBlocked &operator=(const SignalsBlocked &) = delete;

private:
    sigset_t before_;
};

// Starts a thread on which no handler of the program's runs: the program does not expect its
// signals there. Throws std::system_error.
template <class Function>
std::thread start_thread(Function &&function) {
    const SignalsBlocked blocked;
    return std::thread(std::forward<Function>(function));
}

// The calling thread is called `name` from now on, or `name`-`number`, for those who look at a
// program in top, perf or a debugger. Linux shows 15 characters.
inline void name_thread(const char *name) { pthread_setname_np(pthread_self(), name); }
inline void name_thread(const char *name, int number) {
    char text[16];
    std::snprintf(text, sizeof text, "%s-%d", name, number);
    name_thread(text);
}

} // namespace kvf
