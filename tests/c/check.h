/* What every test here uses: checks that end the program with a line that says which one failed, an
 * engine, and jobs of a chosen length. Exit status 77 tells ctest that a test was skipped. */
#ifndef KVFERRY_TESTS_CHECK_H
#define KVFERRY_TESTS_CHECK_H

#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kvferry.h"

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition);          \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

#define CHECK_STATUS(expected, call) check_status(__FILE__, __LINE__, #call, expected, call)
#define CHECK_OK(call) CHECK_STATUS(KVF_OK, call)

static inline void check_status(const char *file, int line, const char *call, int32_t expected,
                                int32_t got) {
    if (got == expected) return;
    fprintf(stderr, "%s:%d: %s returned %d (%s), not %d (%s)\n", file, line, call, got,
            kvf_status_name(got), expected, kvf_status_name(expected));
    exit(1);
}

#define SKIP(...)                                                                                  \
    do {                                                                                           \
        printf("skipped: " __VA_ARGS__);                                                           \
        putchar('\n');                                                                             \
        exit(77);                                                                                  \
    } while (0)

#define MILLISECONDS INT64_C(1000000)
#define SECONDS INT64_C(1000000000)

static inline int64_t clock_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * SECONDS + now.tv_nsec;
}

static inline void sleep_ms(int64_t ms) {
    const struct timespec time = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&time, NULL);
}

static inline bool is_readable(int fd) {
    struct pollfd poll_fd = {fd, POLLIN, 0};
    return poll(&poll_fd, 1, 0) == 1;
}

/* Only the host device: what is tested here does not depend on the device, and must
 * run anywhere. */
static inline kvf_engine make_engine(void) {
    kvf_engine_options options = KVF_ENGINE_OPTIONS_INIT;
    options.devices = KVF_DEVICES_HOST;
    options.copy_threads = 2;
    kvf_engine engine = 0;
    CHECK_OK(kvf_engine_create(&options, &engine));
    return engine;
}

static inline kvf_queue make_queue(void) {
    kvf_queue queue = 0;
    CHECK_OK(kvf_queue_create(&queue));
    return queue;
}

static inline kvf_region plain_region(const void *memory, uint64_t bytes, uint64_t offset) {
    const kvf_region region = {(uint64_t)(uintptr_t)memory, bytes, 1, 0, offset, 0};
    return region;
}

/* A background job that takes a minute if nobody cancels it: the same memory is saved to the same
 * place again and again. (One thread copies for background jobs, so that these copies do
 * not race.) */
enum { LONG_JOB_BYTES = 4 << 20, LONG_JOB_REGIONS = 100000 };
static unsigned char long_job_memory[LONG_JOB_BYTES];
static unsigned char long_job_buffer[LONG_JOB_BYTES];

static inline kvf_job start_long_job_into(void *buffer, kvf_engine engine,
                                          const kvf_submit_options *options) {
    kvf_region *regions = (kvf_region *)malloc(sizeof(kvf_region) * LONG_JOB_REGIONS);
    CHECK(regions);
    for (int i = 0; i < LONG_JOB_REGIONS; ++i) {
        regions[i] = plain_region(long_job_memory, LONG_JOB_BYTES, 0);
    }
    kvf_job job = 0;
    CHECK_OK(
        kvf_regions_save(engine, regions, LONG_JOB_REGIONS, buffer, LONG_JOB_BYTES, options, &job));
    free(regions);
    return job;
}

static inline kvf_job start_long_job(kvf_engine engine, const kvf_submit_options *options) {
    return start_long_job_into(long_job_buffer, engine, options);
}

#endif
