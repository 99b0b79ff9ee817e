// Refuses one allocation of a program's pump threads. For programs that contain the library.
#pragma once

#include <sys/prctl.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

extern "C" char __executable_start, etext;

static std::atomic<int64_t> refused{0}; // the allocation, counted from 1, that is refused; 0: none
static std::atomic<int64_t> asked{0};

static bool is_pump() {
    char name[16] = "";
    prctl(PR_GET_NAME, name);
    return strncmp(name, "kvf-save", 8) == 0 || strncmp(name, "kvf-load", 8) == 0;
}

// Of the library, which this program contains; the simulated driver, outside of it, is spared.
static bool is_refused(const void *caller) {
    if (!refused || caller < &__executable_start || caller >= &etext || !is_pump()) return false;
    return ++asked == refused;
}

// gcc inlines one of the two and not the other, and then takes them for a mismatched pair.
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"

void *operator new(size_t bytes) {
    if (is_refused(__builtin_return_address(0))) throw std::bad_alloc();
    if (void *memory = malloc(bytes ? bytes : 1)) return memory;
    throw std::bad_alloc();
}
void operator delete(void *memory) noexcept { free(memory); }
void operator delete(void *memory, size_t) noexcept { free(memory); }
