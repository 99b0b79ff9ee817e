/* Destroying an engine with jobs in flight: waits for them, refuses new ones, loses
 * no completion. */
#include <pthread.h>
#include <stdatomic.h>

#include "check.h"

static kvf_engine engine;
static atomic_bool destroyed;

static void *destroy(void *argument) {
    (void)argument;
    CHECK_OK(kvf_engine_destroy(engine));
    atomic_store(&destroyed, true);
    return NULL;
}

static void waits_and_refuses(void) {
    engine = make_engine();
    const kvf_queue queue = make_queue();
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.queue = queue;
    const kvf_job job = start_long_job(engine, &options);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, destroy, NULL) == 0);
    static char from, to;
    const kvf_region region = plain_region(&from, 1, 0);
    char error[64] = "";
    kvf_submit_options late = KVF_SUBMIT_OPTIONS_INIT;
    late.queue = queue;
    late.error = error;
    late.error_size = sizeof error;
    kvf_job none = 0;
    int32_t status;
    while ((status = kvf_regions_save(engine, &region, 1, &to, 1, &late, NULL)) == KVF_OK) {
    }
    CHECK(status == KVF_ERR_CLOSED && strstr(error, "closing"));
    CHECK_STATUS(KVF_ERR_CLOSED, kvf_regions_save(engine, &region, 1, &to, 1, &late, &none));
    CHECK(none == 0);
    CHECK_STATUS(KVF_ERR_CLOSED, kvf_regions_save(engine, NULL, 0, NULL, 0, &late, NULL));
    CHECK(!atomic_load(&destroyed));
    CHECK(kvf_engine_destroy(engine) < 0); /* it is being destroyed already */
    CHECK_OK(kvf_engine_cancel(engine));
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK_STATUS(KVF_ERR_INVALID_HANDLE, kvf_engine_cancel(engine));
    kvf_completion completion;
    CHECK_OK(kvf_job_wait(job, 0, &completion, sizeof completion));
    CHECK(completion.status == KVF_ERR_CANCELLED);
    int long_ones = 0;
    while (kvf_queue_take(queue, &completion, sizeof completion, 1, 0) == 1) {
        long_ones += completion.job == job;
    }
    CHECK(long_ones == 1);
    CHECK_OK(kvf_job_release(job));
    CHECK_OK(kvf_queue_destroy(queue));
}

/* Several threads submit until the engine refuses; as many completions as submissions come out. */
static kvf_queue shared_queue;
static atomic_int submitted;

static void *submit(void *argument) {
    static char from[1024];
    char *to = malloc(sizeof from);
    CHECK(to);
    const kvf_region region = plain_region(from, sizeof from, 0);
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.queue = shared_queue;
    options.priority = (uint32_t)(uintptr_t)argument % 2;
    for (;;) {
        const int32_t status =
            kvf_regions_load(engine, &region, 0, to, sizeof from, &options, NULL);
        if (status != KVF_OK) {
            CHECK(status == KVF_ERR_CLOSED || status == KVF_ERR_INVALID_HANDLE);
            break;
        }
        atomic_fetch_add(&submitted, 1);
        if (kvf_regions_save(engine, &region, 1, to, sizeof from, &options, NULL) == KVF_OK) {
            atomic_fetch_add(&submitted, 1);
        }
    }
    return to; /* the jobs may still be using it: freed when the engine is gone */
}

static void under_load(void) {
    kvf_engine_options one_thread = KVF_ENGINE_OPTIONS_INIT; /* urgent jobs here share a buffer */
    one_thread.devices = KVF_DEVICES_HOST;
    one_thread.copy_threads = 1;
    for (int round = 0; round < 20; ++round) {
        CHECK_OK(kvf_engine_create(&one_thread, &engine));
        shared_queue = make_queue();
        atomic_store(&submitted, 0);
        pthread_t threads[3];
        for (uintptr_t i = 0; i < 3; ++i) {
            CHECK(pthread_create(&threads[i], NULL, submit, (void *)i) == 0);
        }
        sleep_ms(5);
        if (round % 2) CHECK_OK(kvf_engine_cancel(engine));
        CHECK_OK(kvf_engine_destroy(engine));
        void *buffers[3];
        for (int i = 0; i < 3; ++i) CHECK(pthread_join(threads[i], &buffers[i]) == 0);
        for (int i = 0; i < 3; ++i) free(buffers[i]);
        kvf_completion completions[64];
        int completed = 0, n;
        while ((n = kvf_queue_take(shared_queue, completions, sizeof completions[0], 64, 0)) > 0) {
            completed += n;
        }
        CHECK(completed == atomic_load(&submitted));
        CHECK_OK(kvf_queue_destroy(shared_queue));
    }
}

int main(void) {
    waits_and_refuses();
    under_load();
    return 0;
}
