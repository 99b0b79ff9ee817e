// Stand-ins for functions of glibc and libstdc++ on old systems. Declared here only for tests.
#pragma once

#include <pthread.h>
#include <time.h>

namespace kvf {

// Stands in for pthread_cond_clockwait() where glibc has none: waits as long, but by the wall
// clock. If somebody sets the wall clock meanwhile, the wait is longer or shorter by as much;
// std::condition_variable notices a wait that was too short. Returns what pthread_cond_timedwait()
// returns.
int wait_by_wall_clock(pthread_cond_t *condition, pthread_mutex_t *mutex, clockid_t clock,
                       const timespec *until);

} // namespace kvf
