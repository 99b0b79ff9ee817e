/* Structs of older and newer programs: a short one gets defaults, a long one may have a tail of
 * zeros. */
#include <stddef.h>

#include "check.h"

static char error[128];

/* A struct as a newer header would declare it. */
struct longer_engine_options {
    kvf_engine_options known;
    uint64_t unknown[4];
};
struct longer_submit_options {
    kvf_submit_options known;
    uint64_t unknown[4];
};

static void sizes_of_engine_options(void) {
    kvf_engine engine;
    CHECK_OK(kvf_engine_create(NULL, &engine));
    CHECK_OK(kvf_engine_destroy(engine));

    /* Every size from the first two fields up, in steps of a field. What lies behind must not be
     * read. */
    for (uint32_t size = 8; size <= sizeof(kvf_engine_options); size += 8) {
        void *exact = malloc(size);
        CHECK(exact);
        memset(exact, 0, size);
        memcpy(exact, &size, sizeof size);
        ((uint32_t *)exact)[1] = KVF_DEVICES_HOST;
        CHECK_OK(kvf_engine_create(exact, &engine));
        CHECK_OK(kvf_engine_destroy(engine));
        free(exact);
    }
    /* Fields beyond the size do not count. */
    kvf_engine_options cut = KVF_ENGINE_OPTIONS_INIT;
    cut.size = offsetof(kvf_engine_options, copy_threads);
    cut.copy_threads = 100000;
    CHECK_OK(kvf_engine_create(&cut, &engine));
    CHECK_OK(kvf_engine_destroy(engine));

    struct longer_engine_options longer = {.known = {.devices = KVF_DEVICES_HOST}};
    longer.known.size = sizeof longer;
    longer.known.error = error;
    longer.known.error_size = sizeof error;
    CHECK_OK(kvf_engine_create(&longer.known, &engine));
    CHECK_OK(kvf_engine_destroy(engine));
    engine = 7;
    longer.unknown[3] = 1;
    CHECK_STATUS(KVF_ERR_STRUCT_SIZE, kvf_engine_create(&longer.known, &engine));
    CHECK(engine == 7 && error[0]);

    const uint32_t wrong[] = {0, 1, 4, 7, 4097, UINT32_MAX};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; ++i) {
        kvf_engine_options options = KVF_ENGINE_OPTIONS_INIT;
        options.size = wrong[i];
        CHECK_STATUS(KVF_ERR_STRUCT_SIZE, kvf_engine_create(&options, &engine));
    }
}

static void bad_engine_options(void) {
    kvf_engine engine;
    kvf_engine_options bad = KVF_ENGINE_OPTIONS_INIT;
    bad.error = error;
    bad.error_size = sizeof error;
    bad.devices = 99;
    error[0] = 0;
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_engine_create(&bad, &engine));
    CHECK(error[0]);
    bad.devices = 0;
    bad.flags = 1u << 31;
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_engine_create(&bad, &engine));
    bad.flags = 0;
    bad.copy_threads = 100000;
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_engine_create(&bad, &engine));

    /* An error text is cut to its place, and always terminated. */
    memset(error, 'x', sizeof error);
    bad.error_size = 8;
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_engine_create(&bad, &engine));
    CHECK(strlen(error) == 7 && error[8] == 'x');
    bad.error_size = 0;
    error[0] = 'x';
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_engine_create(&bad, &engine));
    CHECK(error[0] == 'x');
}

static void submit_options(kvf_engine engine) {
    static char from = 5, to; /* some of the jobs are not waited for */
    const kvf_region region = plain_region(&from, 1, 0);
    for (uint32_t size = 8; size <= sizeof(kvf_submit_options); size += 8) {
        void *exact = malloc(size);
        CHECK(exact);
        memset(exact, 0, size);
        memcpy(exact, &size, sizeof size);
        kvf_job job;
        CHECK_OK(kvf_regions_save(engine, &region, 1, &to, 1, exact, &job));
        CHECK_OK(kvf_job_wait(job, KVF_FOREVER, NULL, 0));
        CHECK_OK(kvf_job_release(job));
        free(exact);
    }
    struct longer_submit_options longer = {{0}, {0}};
    longer.known.size = sizeof longer;
    CHECK_OK(kvf_regions_save(engine, &region, 1, &to, 1, &longer.known, NULL));
    longer.unknown[0] = 1;
    CHECK_STATUS(KVF_ERR_STRUCT_SIZE,
                 kvf_regions_save(engine, &region, 1, &to, 1, &longer.known, NULL));

    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.error = error;
    options.error_size = sizeof error;
    options.flags = 1u << 31;
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT,
                 kvf_regions_save(engine, &region, 1, &to, 1, &options, NULL));
    options.flags = KVF_SUBMIT_FOLLOW_STREAM; /* an engine without CUDA has no streams */
    CHECK_STATUS(KVF_ERR_UNSUPPORTED, kvf_regions_save(engine, &region, 1, &to, 1, &options, NULL));
    options.flags = 0;
    options.priority = 2;
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT,
                 kvf_regions_save(engine, &region, 1, &to, 1, &options, NULL));
    options.priority = 0;
    options.mode = 3;
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT,
                 kvf_regions_save(engine, &region, 1, &to, 1, &options, NULL));
    CHECK(strstr(error, "mode"));

    /* A struct of before `stream` was added is told as much as a new one. */
    options.size = offsetof(kvf_submit_options, stream);
    error[0] = 0;
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT,
                 kvf_regions_save(engine, &region, 1, &to, 1, &options, NULL));
    CHECK(strstr(error, "mode"));
    /* One that ends before `error` is not written through it. */
    options.size = offsetof(kvf_submit_options, error);
    error[0] = 0;
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT,
                 kvf_regions_save(engine, &region, 1, &to, 1, &options, NULL));
    CHECK(error[0] == 0);
}

/* Completions are written at the caller's stride: no further than it, and whole where it
 * is longer. */
static void completions(kvf_engine engine) {
    const kvf_queue queue = make_queue();
    static char from = 5, to; /* some of the jobs are not waited for */
    const kvf_region region = plain_region(&from, 1, 0);
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.queue = queue;

    enum { SHORT = offsetof(kvf_completion, bytes), LONG = sizeof(kvf_completion) + 16 };
    unsigned char out[2 * LONG];
    kvf_job jobs[2];
    const uint64_t strides[] = {SHORT, sizeof(kvf_completion), LONG};
    for (int s = 0; s < 3; ++s) {
        const uint64_t stride = strides[s];
        for (int i = 0; i < 2; ++i) {
            options.user_data = 40 + (uint64_t)i;
            CHECK_OK(kvf_regions_save(engine, &region, 1, &to, 1, &options, &jobs[i]));
            CHECK_OK(kvf_job_wait(jobs[i], KVF_FOREVER, NULL, 0));
        }
        memset(out, 0xee, sizeof out);
        CHECK(kvf_queue_take(queue, (kvf_completion *)(void *)out, stride, 2, 0) == 2);
        for (int i = 0; i < 2; ++i) {
            kvf_completion completion = {0};
            memcpy(&completion, out + (uint64_t)i * stride,
                   stride < sizeof completion ? stride : sizeof completion);
            CHECK(completion.job == jobs[i] && completion.user_data == 40 + (uint64_t)i);
            CHECK(completion.status == KVF_OK);
            /* A newer program finds zeros in fields that this version does not know. */
            for (uint64_t b = sizeof completion; b < stride; ++b) {
                CHECK(out[(uint64_t)i * stride + b] == 0);
            }
        }
        for (uint64_t b = 2 * stride; b < sizeof out; ++b) CHECK(out[b] == 0xee);

        memset(out, 0xee, sizeof out);
        CHECK(kvf_job_poll(jobs[0], (kvf_completion *)(void *)out, stride) == 1);
        for (uint64_t b = stride; b < sizeof out; ++b) CHECK(out[b] == 0xee);
        for (uint64_t b = sizeof(kvf_completion); b < stride; ++b) CHECK(out[b] == 0);
        CHECK_OK(kvf_job_wait(jobs[1], 0, (kvf_completion *)(void *)out, stride));
        if (s < 2) {
            for (int i = 0; i < 2; ++i) CHECK_OK(kvf_job_release(jobs[i]));
        }
    }

    kvf_completion completion;
    const uint64_t wrong[] = {0, 7, UINT64_C(1) << 40, UINT64_MAX};
    for (int i = 0; i < 4; ++i) {
        CHECK_STATUS(KVF_ERR_STRUCT_SIZE, kvf_queue_take(queue, &completion, wrong[i], 1, 0));
        CHECK_STATUS(KVF_ERR_STRUCT_SIZE, kvf_job_poll(jobs[0], &completion, wrong[i]));
        CHECK_STATUS(KVF_ERR_STRUCT_SIZE, kvf_job_wait(jobs[0], 0, &completion, wrong[i]));
    }
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_queue_take(queue, NULL, sizeof completion, 1, 0));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT,
                 kvf_queue_take(queue, &completion, sizeof completion, 0, 0));
    CHECK(kvf_job_poll(jobs[0], NULL, 0) == 1);
    for (int i = 0; i < 2; ++i) CHECK_OK(kvf_job_release(jobs[i]));
    CHECK_OK(kvf_queue_destroy(queue));
}

int main(void) {
    sizes_of_engine_options();
    bad_engine_options();
    const kvf_engine engine = make_engine();
    submit_options(engine);
    completions(engine);
    CHECK_OK(kvf_engine_destroy(engine));
    return 0;
}
