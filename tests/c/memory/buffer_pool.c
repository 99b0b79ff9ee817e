/* Buffers of the pool: page-aligned, reused, not freed twice or under a job, valid without their
 * engine. */
#include <pthread.h>
#include <unistd.h>

#include "check.h"

static uint64_t described(kvf_engine engine, const char *key) {
    char json[8192], quoted[32];
    CHECK_OK(kvf_engine_describe(engine, json, sizeof json, NULL));
    snprintf(quoted, sizeof quoted, "\"%s\": ", key);
    const char *value = strstr(strstr(json, "\"pool\""), quoted);
    CHECK(value);
    return strtoull(value + strlen(quoted), NULL, 10);
}

static kvf_engine shared;

static void *alloc_and_free(void *argument) {
    unsigned random = (unsigned)(uintptr_t)argument;
    for (int i = 0; i < 2000; ++i) {
        random = random * 1664525u + 1013904223u;
        const uint64_t bytes = 1 + (random >> 8) % 300000;
        unsigned char *buffer;
        CHECK_OK(kvf_buffer_alloc(shared, bytes, (void **)&buffer));
        buffer[0] = buffer[bytes - 1] = (unsigned char)i;
        if (i % 16 == 0) CHECK_OK(kvf_buffer_trim(shared));
        CHECK(buffer[0] == (unsigned char)i && buffer[bytes - 1] == (unsigned char)i);
        CHECK_OK(kvf_buffer_free(buffer));
    }
    return NULL;
}

static void aligned_and_reused(kvf_engine engine) {
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);

    const uint64_t sizes[] = {1, 4095, 4096, 4097, 100000, 2 << 20, (2 << 20) + 1, 9 << 20};
    for (int i = 0; i < 8; ++i) {
        unsigned char *buffer = NULL;
        CHECK_OK(kvf_buffer_alloc(engine, sizes[i], (void **)&buffer));
        CHECK(buffer && (uintptr_t)buffer % page == 0);
        buffer[0] = 1;
        buffer[sizes[i] - 1] = 1;
        CHECK_OK(kvf_buffer_free(buffer));
        CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_buffer_free(buffer));
        void *again = NULL;
        CHECK_OK(kvf_buffer_alloc(engine, sizes[i], &again));
        CHECK(again == buffer); /* reused */
        CHECK_OK(kvf_buffer_free(again));
    }
    CHECK(described(engine, "mapped") > 0);
    CHECK(described(engine, "mapped") == described(engine, "free"));
    CHECK_OK(kvf_buffer_trim(engine));
    CHECK(described(engine, "mapped") == 0 && described(engine, "free") == 0);
}

static void bad_arguments_are_refused(kvf_engine engine) {
    char local;
    unsigned char *buffer;
    CHECK_OK(kvf_buffer_free(NULL));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_buffer_free(&local));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_buffer_alloc(engine, 0, (void **)&buffer));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_buffer_alloc(engine, 1, NULL));
    CHECK_STATUS(KVF_ERR_OUT_OF_MEMORY, kvf_buffer_alloc(engine, UINT64_MAX, (void **)&buffer));
    CHECK_STATUS(KVF_ERR_OUT_OF_MEMORY,
                 kvf_buffer_alloc(engine, UINT64_C(1) << 46, (void **)&buffer));
    CHECK(described(engine, "mapped") == 0);
}

/* Not freed while in use, and not by an address in its middle either. */
static void not_freed_under_a_job(kvf_engine engine) {
    unsigned char *buffer;
    CHECK_OK(kvf_buffer_alloc(engine, LONG_JOB_BYTES + 100, (void **)&buffer));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_buffer_free(buffer + 1));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_buffer_unregister(engine, buffer));
    enum { REGIONS = 50000 };
    static kvf_region regions[REGIONS];
    for (int i = 0; i < REGIONS; ++i) {
        regions[i] = plain_region(long_job_memory, LONG_JOB_BYTES, 50);
    }
    kvf_job job;
    CHECK_OK(kvf_regions_save(engine, regions, REGIONS, buffer, LONG_JOB_BYTES + 50, NULL, &job));
    CHECK_STATUS(KVF_ERR_BUSY, kvf_buffer_free(buffer));
    CHECK_OK(kvf_job_cancel(job));
    CHECK_OK(kvf_job_wait(job, KVF_FOREVER, NULL, 0));
    CHECK_OK(kvf_buffer_free(buffer)); /* at once: the completion has been seen */
    CHECK_OK(kvf_job_release(job));
}

/* Whoever has the completion may free. */
static void freed_after_the_completion(kvf_engine engine) {
    unsigned char *buffer;
    const kvf_queue queue = make_queue();
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.queue = queue;
    const kvf_region region = plain_region(long_job_memory, 4096, 0);
    for (int i = 0; i < 5000; ++i) {
        CHECK_OK(kvf_buffer_alloc(engine, 4096, (void **)&buffer));
        options.priority = (uint32_t)(i % 2);
        CHECK_OK(kvf_regions_save(engine, &region, 1, buffer, 4096, &options, NULL));
        kvf_completion completion;
        CHECK(kvf_queue_take(queue, &completion, sizeof completion, 1, KVF_FOREVER) == 1);
        CHECK_OK(kvf_buffer_free(buffer));
    }
    CHECK_OK(kvf_queue_destroy(queue));
}

static void allocated_by_many_threads(kvf_engine engine) {
    shared = engine;
    pthread_t threads[4];
    for (uintptr_t i = 0; i < 4; ++i) {
        CHECK(pthread_create(&threads[i], NULL, alloc_and_free, (void *)i) == 0);
    }
    for (int i = 0; i < 4; ++i) CHECK(pthread_join(threads[i], NULL) == 0);
}

static void outlives_its_engine(kvf_engine engine) {
    unsigned char *buffer;
    CHECK_OK(kvf_buffer_alloc(engine, 10000, (void **)&buffer));
    CHECK_OK(kvf_engine_destroy(engine));
    memset(buffer, 1, 10000);
    CHECK_OK(kvf_buffer_free(buffer));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_buffer_free(buffer));
}

int main(void) {
    const kvf_engine engine = make_engine();
    aligned_and_reused(engine);
    bad_arguments_are_refused(engine);
    not_freed_under_a_job(engine);
    freed_after_the_completion(engine);
    allocated_by_many_threads(engine);
    outlives_its_engine(engine);
    return 0;
}
