/* Callbacks come on one thread of the engine's, one at a time, and may call back into
 * the library. */
#include <pthread.h>
#include <stdatomic.h>

#include "check.h"

static kvf_engine engine;
static char from[4096], to[4096];
static atomic_int calls, inside;
static pthread_t dispatch_thread;
static _Atomic uint64_t sum;

static void count(const kvf_completion *completion) {
    CHECK(atomic_fetch_add(&inside, 1) == 0);
    if (atomic_fetch_add(&calls, 1) == 0) dispatch_thread = pthread_self();
    CHECK(pthread_equal(dispatch_thread, pthread_self()));
    CHECK(completion->status == KVF_OK && completion->bytes == sizeof from);
    atomic_fetch_add(&sum, completion->user_data);
    atomic_fetch_sub(&inside, 1);
}

/* Submits the next one, polls itself, and tries what it must not do. */
static void chain(const kvf_completion *completion) {
    CHECK(kvf_job_poll(completion->job, NULL, 0) ==
          KVF_ERR_INVALID_HANDLE); /* no handle was made */
    CHECK_STATUS(KVF_ERR_BUSY, kvf_engine_destroy(engine));
    void *buffer;
    CHECK_OK(kvf_buffer_alloc(engine, 100, &buffer));
    CHECK_OK(kvf_buffer_free(buffer));
    if (completion->user_data == 0) {
        atomic_store(&calls, -1);
        return;
    }
    const kvf_region region = plain_region(from, sizeof from, 0);
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.callback = chain;
    options.user_data = completion->user_data - 1;
    options.priority = (uint32_t)(options.user_data % 2);
    CHECK_OK(kvf_regions_save(engine, &region, 1, to, sizeof to, &options, NULL));
}

static void slow(const kvf_completion *completion) {
    (void)completion;
    sleep_ms(100);
    atomic_fetch_add(&calls, 1);
}

int main(void) {
    engine = make_engine();
    const kvf_queue queue = make_queue();
    const kvf_region region = plain_region(from, sizeof from, 0);
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;

    enum { JOBS = 10000 };
    options.callback = count;
    options.queue = queue;
    uint64_t expected = 0;
    for (uint64_t i = 0; i < JOBS; ++i) {
        options.user_data = i;
        expected += i;
        CHECK_OK(kvf_regions_save(engine, &region, 1, to, sizeof to, &options, NULL));
    }
    kvf_completion completion;
    for (int i = 0; i < JOBS; ++i) { /* the queue gets them all as well */
        CHECK(kvf_queue_take(queue, &completion, sizeof completion, 1, 20 * SECONDS) == 1);
    }
    while (atomic_load(&calls) < JOBS) sleep_ms(1);
    CHECK(atomic_load(&calls) == JOBS && atomic_load(&sum) == expected);
    CHECK(!pthread_equal(dispatch_thread, pthread_self()));

    options.callback = chain;
    options.queue = 0;
    options.user_data = 1000;
    CHECK_OK(kvf_regions_save(engine, &region, 1, to, sizeof to, &options, NULL));
    while (atomic_load(&calls) != -1) sleep_ms(1);

    /* A slow callback holds up neither jobs nor the queue, and destroy waits for it. */
    atomic_store(&calls, 0);
    options.callback = slow;
    options.queue = queue;
    const int64_t begin = clock_ns();
    for (int i = 0; i < 3; ++i) {
        CHECK_OK(kvf_regions_save(engine, &region, 1, to, sizeof to, &options, NULL));
    }
    for (int i = 0; i < 3; ++i) {
        CHECK(kvf_queue_take(queue, &completion, sizeof completion, 1, 20 * SECONDS) == 1);
    }
    CHECK(atomic_load(&calls) < 3);
    CHECK_OK(kvf_engine_destroy(engine));
    CHECK(atomic_load(&calls) == 3);
    CHECK(clock_ns() - begin >= 300 * MILLISECONDS);
    CHECK_OK(kvf_queue_destroy(queue));
    return 0;
}
