// Lets the shared library run on systems whose C and C++ libraries are older than those it was
// built with.
//
// A library asks the loader for symbols with versions. A compiler takes the newest version of each
// function that it finds, even of functions that have existed for decades: glibc 2.34, for
// instance, gave new versions to those that it moved from libpthread and libdl into libc. A system
// without this version refuses the library. Each function below is hidden, takes the place of one
// whose newest version is too new, and calls an old version, which newer systems keep. Only the
// shared library contains these functions: programs that link libkvferry.a get what their own
// linker chooses.
//
// manylinux_2_28 sets the limits: GLIBC_2.28, GLIBCXX_3.4.24, CXXABI_1.3.11. Where a newer compiler
// asks for newer symbols, `make dist` fails; `auditwheel show` then names the versions, `objdump
// -T` the functions.
#include <dlfcn.h>
#include <pthread.h>
#include <sys/stat.h>

#include <cerrno>
#include <condition_variable>
#include <csignal>
#include <ctime>
#include <mutex>
#include <new>

#include "core/old_symbols.h"

#define HIDDEN __attribute__((visibility("hidden")))
// This file calls `name`; the linker takes `symbol` of `version` for it.
#define OLD(name, symbol, version) __asm__(".symver " #name ", " #symbol "@" version)

extern "C" {

// ---- glibc --------------------------------------------------------------------------------------

void *old_dlopen(const char *, int);
void *old_dlsym(void *, const char *);
int old_dlclose(void *);
char *old_dlerror();
OLD(old_dlopen, dlopen, "GLIBC_2.2.5");
OLD(old_dlsym, dlsym, "GLIBC_2.2.5");
OLD(old_dlclose, dlclose, "GLIBC_2.2.5");
OLD(old_dlerror, dlerror, "GLIBC_2.2.5");
HIDDEN void *dlopen(const char *path, int mode) noexcept { return old_dlopen(path, mode); }
HIDDEN void *dlsym(void *handle, const char *name) noexcept { return old_dlsym(handle, name); }
HIDDEN int dlclose(void *handle) noexcept { return old_dlclose(handle); }
HIDDEN char *dlerror() noexcept { return old_dlerror(); }

int old_pthread_mutex_trylock(pthread_mutex_t *);
int old_pthread_setname_np(pthread_t, const char *);
int old_pthread_sigmask(int, const sigset_t *, sigset_t *);
OLD(old_pthread_mutex_trylock, pthread_mutex_trylock, "GLIBC_2.2.5");
OLD(old_pthread_setname_np, pthread_setname_np, "GLIBC_2.12");
OLD(old_pthread_sigmask, pthread_sigmask, "GLIBC_2.2.5");
HIDDEN int pthread_mutex_trylock(pthread_mutex_t *mutex) noexcept {
    return old_pthread_mutex_trylock(mutex);
}
HIDDEN int pthread_setname_np(pthread_t thread, const char *name) noexcept {
    return old_pthread_setname_np(thread, name);
}
HIDDEN int pthread_sigmask(int how, const sigset_t *wanted, sigset_t *before) noexcept {
    return old_pthread_sigmask(how, wanted, before);
}

// Until glibc 2.33, stat() in <sys/stat.h> called this, with the version of struct stat.
int old_xstat(int, const char *, struct stat *);
OLD(old_xstat, __xstat, "GLIBC_2.2.5");
HIDDEN int stat(const char *path, struct stat *result) noexcept {
    return old_xstat(1, path, result);
}

// Tells whether the process has one thread only: then std::shared_ptr counts without atomic
// operations. 0 is always right.
HIDDEN char __libc_single_threaded = 0;

// glibc has had this function since 2.30. Before, no wait on a std::condition_variable could follow
// the steady clock.
HIDDEN int pthread_cond_clockwait(pthread_cond_t *condition, pthread_mutex_t *mutex,
                                  clockid_t clock, const timespec *until) {
    static const auto newer = reinterpret_cast<decltype(&pthread_cond_clockwait)>(
        old_dlsym(RTLD_DEFAULT, "pthread_cond_clockwait"));
    return newer ? newer(condition, mutex, clock, until)
                 : kvf::wait_by_wall_clock(condition, mutex, clock, until);
}

// ---- libstdc++ ----------------------------------------------------------------------------------

// std::condition_variable::wait(), which is noexcept since GCC 12.
void old_condition_wait(std::condition_variable *, std::unique_lock<std::mutex> *);
OLD(old_condition_wait, _ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE,
    "GLIBCXX_3.4.11");
HIDDEN void new_condition_wait(std::condition_variable *, std::unique_lock<std::mutex> *) __asm__(
    "_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE");
void new_condition_wait(std::condition_variable *condition, std::unique_lock<std::mutex> *lock) {
    old_condition_wait(condition, lock);
}

// std::__throw_bad_array_new_length(), which `new T[n]` calls since GCC 11.
[[noreturn]] HIDDEN void
throw_bad_array_new_length() __asm__("_ZSt28__throw_bad_array_new_lengthv");
void throw_bad_array_new_length() { throw std::bad_array_new_length(); }

// Since GCC 12, inline code copies and destroys std::exception_ptr through these two members. Older
// compilers called the copy constructor and the destructor in the C++ library instead. An
// exception_ptr is one pointer.
void old_exception_copy(void *copy, const void *pointer);
void old_exception_destroy(void *pointer);
OLD(old_exception_copy, _ZNSt15__exception_ptr13exception_ptrC1ERKS0_, "CXXABI_1.3.3");
OLD(old_exception_destroy, _ZNSt15__exception_ptr13exception_ptrD1Ev, "CXXABI_1.3.3");
HIDDEN void
exception_add_reference(void *) __asm__("_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
HIDDEN void
exception_release(void *) __asm__("_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");
void exception_add_reference(void *pointer) {
    void *copy; // never destroyed: the reference is the one that was asked for
    old_exception_copy(static_cast<void *>(&copy), pointer);
}
void exception_release(void *pointer) {
    old_exception_destroy(pointer);
    *static_cast<void **>(pointer) = nullptr;
}

} // extern "C"

namespace kvf {

int wait_by_wall_clock(pthread_cond_t *condition, pthread_mutex_t *mutex, clockid_t clock,
                       const timespec *until) {
    constexpr long second = 1'000'000'000;
    timespec now, wall;
    if (clock_gettime(clock, &now) != 0) return EINVAL;
    clock_gettime(CLOCK_REALTIME, &wall);
    wall.tv_sec += until->tv_sec - now.tv_sec;
    wall.tv_nsec += until->tv_nsec - now.tv_nsec;
    if (wall.tv_nsec < 0) {
        wall.tv_nsec += second;
        --wall.tv_sec;
    } else if (wall.tv_nsec >= second) {
        wall.tv_nsec -= second;
        ++wall.tv_sec;
    }
    return pthread_cond_timedwait(condition, mutex, &wall);
}

} // namespace kvf
