/* Several threads submit to one engine, with queues of their own; each gets back what
 * it submitted. */
#include <pthread.h>

#include "check.h"

enum { THREADS = 4, JOBS = 5000, BYTES = 2000, WINDOW = 32 };
static kvf_engine engine;

static void *run(void *argument) {
    const uint64_t me = (uintptr_t)argument;
    const kvf_queue queue = make_queue();
    unsigned char from[BYTES], (*to)[BYTES] = malloc(WINDOW * BYTES);
    CHECK(to);
    memset(from, (int)me, sizeof from);
    const kvf_region region = {(uintptr_t)from, 100, 20, 100, 0, 100};
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.queue = queue;
    int in_flight = 0, seen = 0;
    for (uint64_t i = 0; i < JOBS; ++i) {
        options.user_data = me << 32 | i;
        options.priority = (uint32_t)(i % 2);
        kvf_job job;
        const bool handle = i % 3 == 0;
        CHECK_OK(kvf_regions_save(engine, &region, 1, to[i % WINDOW], BYTES, &options,
                                  handle ? &job : NULL));
        if (handle) CHECK_OK(kvf_job_release(job));
        if (++in_flight < WINDOW && i + 1 < JOBS) continue;
        while (in_flight > 0) {
            kvf_completion completions[WINDOW];
            const int32_t n =
                kvf_queue_take(queue, completions, sizeof completions[0], WINDOW, 20 * SECONDS);
            CHECK(n > 0);
            for (int32_t c = 0; c < n; ++c) {
                CHECK(completions[c].user_data >> 32 == me && completions[c].status == KVF_OK);
                const uint64_t which = (uint32_t)completions[c].user_data % WINDOW;
                CHECK(to[which][0] == me && to[which][BYTES - 1] == me);
            }
            in_flight -= n;
            seen += n;
        }
    }
    CHECK(seen == JOBS);
    CHECK_OK(kvf_queue_destroy(queue));
    free(to);
    return NULL;
}

int main(void) {
    engine = make_engine();
    pthread_t threads[THREADS];
    for (uintptr_t i = 0; i < THREADS; ++i) {
        CHECK(pthread_create(&threads[i], NULL, run, (void *)(i + 1)) == 0);
    }
    for (int i = 0; i < THREADS; ++i) CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK_OK(kvf_engine_destroy(engine));
    return 0;
}
