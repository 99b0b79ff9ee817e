/* Each wake makes one take return 0, waiting or to come; timeouts are kept, also absurdly long
 * ones. */
#define _GNU_SOURCE /* pthread_tryjoin_np */
#include <pthread.h>

#include "check.h"

static void *take_forever(void *queue) {
    kvf_completion completion;
    CHECK(kvf_queue_take(*(kvf_queue *)queue, &completion, sizeof completion, 1, KVF_FOREVER) == 0);
    return NULL;
}

static void *take_long(void *queue) {
    kvf_completion completion;
    CHECK(kvf_queue_take(*(kvf_queue *)queue, &completion, sizeof completion, 1, INT64_MAX) == 0);
    return NULL;
}

int main(void) {
    kvf_queue queue = make_queue();
    const int fd = kvf_queue_fd(queue);
    kvf_completion completion;

    /* Wakes are counted: threads that are not waiting yet, and are busy, get theirs too. */
    CHECK_OK(kvf_queue_wake(queue));
    CHECK_OK(kvf_queue_wake(queue));
    CHECK(is_readable(fd));
    CHECK(kvf_queue_take(queue, &completion, sizeof completion, 1, KVF_FOREVER) == 0);
    CHECK(is_readable(fd));
    int64_t begin = clock_ns();
    CHECK(kvf_queue_take(queue, &completion, sizeof completion, 1, 10 * SECONDS) == 0);
    CHECK(clock_ns() - begin < 5 * SECONDS);
    CHECK(!is_readable(fd));

    begin = clock_ns();
    CHECK(kvf_queue_take(queue, &completion, sizeof completion, 1, 20 * MILLISECONDS) == 0);
    CHECK(clock_ns() - begin >= 20 * MILLISECONDS);

    void *(*const takers[])(void *) = {take_forever, take_long};
    for (int i = 0; i < 2; ++i) {
        pthread_t thread;
        CHECK(pthread_create(&thread, NULL, takers[i], &queue) == 0);
        sleep_ms(50);
        CHECK(pthread_tryjoin_np(thread, NULL) != 0); /* it waits */
        CHECK_OK(kvf_queue_wake(queue));
        CHECK(pthread_join(thread, NULL) == 0);
        CHECK(!is_readable(fd));
    }

    /* Each of several threads that wait needs a wake of its own; a destroy releases all that are
     * left. */
    enum { THREADS = 4 };
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; ++i) {
        CHECK(pthread_create(&threads[i], NULL, take_forever, &queue) == 0);
    }
    sleep_ms(50);
    CHECK_OK(kvf_queue_wake(queue));
    sleep_ms(50);
    int returned = 0;
    bool joined[THREADS] = {false};
    for (int i = 0; i < THREADS; ++i) {
        joined[i] = pthread_tryjoin_np(threads[i], NULL) == 0;
        returned += joined[i];
    }
    CHECK(returned == 1);
    /* Two at once, before the first thread that is woken can run: both return. */
    CHECK_OK(kvf_queue_wake(queue));
    CHECK_OK(kvf_queue_wake(queue));
    const int64_t until = clock_ns() + 10 * SECONDS;
    while (returned < 3 && clock_ns() < until) {
        for (int i = 0; i < THREADS; ++i) {
            if (joined[i]) continue;
            joined[i] = pthread_tryjoin_np(threads[i], NULL) == 0;
            returned += joined[i];
        }
    }
    CHECK(returned == 3);
    CHECK_OK(kvf_queue_destroy(queue));
    for (int i = 0; i < THREADS; ++i) {
        if (!joined[i]) CHECK(pthread_join(threads[i], NULL) == 0);
    }

    /* A wake does not hide a completion, and a completion uses up no wake: a thread that goes on
     * until a take returns 0 would wait for ever. */
    const kvf_engine engine = make_engine();
    queue = make_queue();
    char from = 3, to = 0;
    const kvf_region region = plain_region(&from, 1, 0);
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.queue = queue;
    CHECK_OK(kvf_queue_wake(queue));
    kvf_job job;
    CHECK_OK(kvf_regions_save(engine, &region, 1, &to, 1, &options, &job));
    CHECK_OK(kvf_job_wait(job, KVF_FOREVER, NULL, 0));
    CHECK_OK(kvf_job_release(job));
    CHECK(kvf_queue_take(queue, &completion, sizeof completion, 1, KVF_FOREVER) == 1);
    CHECK(is_readable(kvf_queue_fd(queue)));
    CHECK(kvf_queue_take(queue, &completion, sizeof completion, 1, SECONDS) == 0);
    CHECK(!is_readable(kvf_queue_fd(queue)));
    CHECK_OK(kvf_engine_destroy(engine));
    CHECK_OK(kvf_queue_destroy(queue));
    return 0;
}
