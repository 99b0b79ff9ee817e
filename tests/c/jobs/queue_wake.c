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

/* Wakes are counted: threads that are not waiting yet, and are busy, get theirs too. */
static void wakes_are_counted(kvf_queue queue) {
    const int fd = kvf_queue_fd(queue);
    kvf_completion completion;
    CHECK_OK(kvf_queue_wake(queue));
    CHECK_OK(kvf_queue_wake(queue));
    CHECK(is_readable(fd));
    CHECK(kvf_queue_take(queue, &completion, sizeof completion, 1, KVF_FOREVER) == 0);
    CHECK(is_readable(fd));
    const int64_t begin = clock_ns();
    CHECK(kvf_queue_take(queue, &completion, sizeof completion, 1, 10 * SECONDS) == 0);
    CHECK(clock_ns() - begin < 5 * SECONDS);
    CHECK(!is_readable(fd));
}

static void timeouts_are_kept(kvf_queue queue) {
    kvf_completion completion;
    const int64_t begin = clock_ns();
    CHECK(kvf_queue_take(queue, &completion, sizeof completion, 1, 20 * MILLISECONDS) == 0);
    CHECK(clock_ns() - begin >= 20 * MILLISECONDS);
}

static void a_wake_ends_a_long_take(kvf_queue queue) {
    void *(*const takers[])(void *) = {take_forever, take_long};
    for (int i = 0; i < 2; ++i) {
        pthread_t thread;
        CHECK(pthread_create(&thread, NULL, takers[i], &queue) == 0);
        sleep_ms(50);
        CHECK(pthread_tryjoin_np(thread, NULL) != 0); /* it waits */
        CHECK_OK(kvf_queue_wake(queue));
        CHECK(pthread_join(thread, NULL) == 0);
        CHECK(!is_readable(kvf_queue_fd(queue)));
    }
}

enum { THREADS = 4 };

/* Joins those threads that have returned. Returns how many. */
static int join_returned(const pthread_t *threads, bool *joined) {
    int returned = 0;
    for (int i = 0; i < THREADS; ++i) {
        if (joined[i]) continue;
        joined[i] = pthread_tryjoin_np(threads[i], NULL) == 0;
        returned += joined[i];
    }
    return returned;
}

/* Each of several threads that wait needs a wake of its own; a destroy releases all that are
 * left. */
static void each_thread_needs_a_wake(void) {
    kvf_queue queue = make_queue();
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; ++i) {
        CHECK(pthread_create(&threads[i], NULL, take_forever, &queue) == 0);
    }
    sleep_ms(50);
    CHECK_OK(kvf_queue_wake(queue));
    sleep_ms(50);
    bool joined[THREADS] = {false};
    int returned = join_returned(threads, joined);
    CHECK(returned == 1);
    /* Two at once, before the first thread that is woken can run: both return. */
    CHECK_OK(kvf_queue_wake(queue));
    CHECK_OK(kvf_queue_wake(queue));
    const int64_t until = clock_ns() + 10 * SECONDS;
    while (returned < 3 && clock_ns() < until) returned += join_returned(threads, joined);
    CHECK(returned == 3);
    CHECK_OK(kvf_queue_destroy(queue));
    for (int i = 0; i < THREADS; ++i) {
        if (!joined[i]) CHECK(pthread_join(threads[i], NULL) == 0);
    }
}

/* A wake does not hide a completion, and a completion uses up no wake: a thread that goes on until
 * a take returns 0 would wait for ever. */
static void wakes_and_completions_are_apart(void) {
    const kvf_engine engine = make_engine();
    const kvf_queue queue = make_queue();
    char from = 3, to = 0;
    const kvf_region region = plain_region(&from, 1, 0);
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.queue = queue;
    CHECK_OK(kvf_queue_wake(queue));
    kvf_job job;
    kvf_completion completion;
    CHECK_OK(kvf_regions_save(engine, &region, 1, &to, 1, &options, &job));
    CHECK_OK(kvf_job_wait(job, KVF_FOREVER, NULL, 0));
    CHECK_OK(kvf_job_release(job));
    CHECK(kvf_queue_take(queue, &completion, sizeof completion, 1, KVF_FOREVER) == 1);
    CHECK(is_readable(kvf_queue_fd(queue)));
    CHECK(kvf_queue_take(queue, &completion, sizeof completion, 1, SECONDS) == 0);
    CHECK(!is_readable(kvf_queue_fd(queue)));
    CHECK_OK(kvf_engine_destroy(engine));
    CHECK_OK(kvf_queue_destroy(queue));
}

int main(void) {
    const kvf_queue queue = make_queue();
    wakes_are_counted(queue);
    timeouts_are_kept(queue);
    a_wake_ends_a_long_take(queue);
    CHECK_OK(kvf_queue_destroy(queue));
    each_thread_needs_a_wake();
    wakes_and_completions_are_apart();
    return 0;
}
