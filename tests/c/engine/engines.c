/* Many engines in one process, made and destroyed by several threads, sharing one queue. */
#include <pthread.h>

#include "check.h"

enum { THREADS = 4, ENGINES = 8, ROUNDS = 10 };
static kvf_queue queue;

static void *run(void *argument) {
    (void)argument;
    for (int round = 0; round < ROUNDS; ++round) {
        kvf_engine engines[ENGINES];
        static char from[10000];
        char to[ENGINES][sizeof from];
        const kvf_region region = plain_region(from, sizeof from, 0);
        kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
        options.queue = queue;
        for (int i = 0; i < ENGINES; ++i) engines[i] = make_engine();
        for (int i = 0; i < ENGINES; ++i) {
            options.priority = (uint32_t)(i % 2);
            CHECK_OK(kvf_regions_save(engines[i], &region, 1, to[i], sizeof to[i], &options, NULL));
        }
        for (int i = 0; i < ENGINES; ++i) CHECK_OK(kvf_engine_destroy(engines[i]));
    }
    return NULL;
}

int main(void) {
    queue = make_queue();
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; ++i) CHECK(pthread_create(&threads[i], NULL, run, NULL) == 0);
    for (int i = 0; i < THREADS; ++i) CHECK(pthread_join(threads[i], NULL) == 0);
    kvf_completion completion;
    int taken = 0;
    while (kvf_queue_take(queue, &completion, sizeof completion, 1, 0) == 1) {
        CHECK(completion.status == KVF_OK);
        ++taken;
    }
    CHECK(taken == THREADS * ENGINES * ROUNDS);
    CHECK_OK(kvf_queue_destroy(queue));

    /* An engine that was never used is free of threads; many of them cost nothing. */
    enum { IDLE = 500 };
    kvf_engine idle[IDLE];
    for (int i = 0; i < IDLE; ++i) idle[i] = make_engine();
    for (int i = IDLE; i-- > 0;) CHECK_OK(kvf_engine_destroy(idle[i]));
    return 0;
}
