/* Several threads take from one queue: each completion goes to exactly one of them. */
#include <pthread.h>
#include <stdatomic.h>

#include "check.h"

enum { JOBS = 20000, TAKERS = 4 };
static atomic_int seen[JOBS];
static atomic_int taken;
static kvf_queue queue;

static void *take(void *argument) {
    const uint32_t capacity = (uint32_t)(uintptr_t)argument;
    kvf_completion completions[8];
    while (atomic_load(&taken) < JOBS) {
        const int32_t n = kvf_queue_take(queue, completions, sizeof(kvf_completion), capacity,
                                         capacity == 1 ? KVF_FOREVER : 50 * MILLISECONDS);
        CHECK(n >= 0 && n <= (int32_t)capacity);
        for (int32_t i = 0; i < n; ++i) atomic_fetch_add(&seen[completions[i].user_data], 1);
        if (n > 0 && atomic_fetch_add(&taken, n) + n == JOBS) {
            for (int i = 0; i < TAKERS; ++i) {
                CHECK_OK(kvf_queue_wake(queue));
                sleep_ms(1);
            }
        }
        if (n == 0 && atomic_load(&taken) == JOBS) CHECK_OK(kvf_queue_wake(queue)); /* pass it on */
    }
    return NULL;
}

int main(void) {
    const kvf_engine engine = make_engine();
    queue = make_queue();
    pthread_t takers[TAKERS];
    for (int i = 0; i < TAKERS; ++i) {
        CHECK(pthread_create(&takers[i], NULL, take, (void *)(uintptr_t)(1 + i % 3)) == 0);
    }
    static char from[64], to[64];
    const kvf_region region = plain_region(from, sizeof from, 0);
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.queue = queue;
    for (uint64_t i = 0; i < JOBS; ++i) {
        options.user_data = i;
        CHECK_OK(kvf_regions_save(engine, &region, 1, to, sizeof to, &options, NULL));
    }
    for (int i = 0; i < TAKERS; ++i) CHECK(pthread_join(takers[i], NULL) == 0);
    for (int i = 0; i < JOBS; ++i) CHECK(atomic_load(&seen[i]) == 1);
    CHECK_OK(kvf_engine_destroy(engine));
    CHECK_OK(kvf_queue_destroy(queue));
    return 0;
}
