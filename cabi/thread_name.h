// Names of the library's threads, for those who look at a program in top, perf or a debugger.
#pragma once

#include <pthread.h>

#include <cstdio>

namespace kvf {

// The calling thread is called `name` from now on, or `name`-`number`. Linux shows 15 characters.
inline void name_thread(const char *name) { pthread_setname_np(pthread_self(), name); }
inline void name_thread(const char *name, int number) {
    char text[16];
    std::snprintf(text, sizeof text, "%s-%d", name, number);
    name_thread(text);
}

} // namespace kvf
