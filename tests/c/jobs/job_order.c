/* Within a priority, the job that came first goes first: a program that submits many has the first
 * buffers back while the last still wait. */
#include "check.h"

enum { JOBS = 20, BYTES = 5 << 20 /* several pieces */ };

static unsigned char memory[BYTES], buffers[JOBS][BYTES];

static void submit_all(kvf_engine engine, kvf_submit_options options) {
    const kvf_region region = plain_region(memory, BYTES, 0);
    for (uint64_t i = 0; i < JOBS; ++i) {
        options.user_data = i;
        CHECK_OK(kvf_regions_save(engine, &region, 1, buffers[i], BYTES, &options, NULL));
    }
}

static void take_all(kvf_queue queue, kvf_completion *completions) {
    for (int i = 0; i < JOBS; ++i) {
        CHECK(kvf_queue_take(queue, &completions[i], sizeof *completions, 1, 60 * SECONDS) == 1);
        CHECK_OK(completions[i].status);
    }
}

int main(void) {
    const kvf_engine engine = make_engine();
    const kvf_queue queue = make_queue();
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.queue = queue;
    kvf_completion completions[JOBS];

    /* One thread moves background jobs. */
    const kvf_job first = start_long_job(engine, NULL);
    submit_all(engine, options);
    sleep_ms(20);
    kvf_completion none;
    CHECK(kvf_queue_take(queue, &none, sizeof none, 1, 0) == 0);
    CHECK_OK(kvf_job_cancel(first));
    take_all(queue, completions);
    for (uint64_t i = 0; i < JOBS; ++i) CHECK(completions[i].user_data == i);
    CHECK_OK(kvf_job_wait(first, KVF_FOREVER, NULL, 0));
    CHECK_OK(kvf_job_release(first));

    /* Several move urgent ones, here two: each has a piece of another job at most. */
    options.priority = KVF_PRIORITY_URGENT;
    submit_all(engine, options);
    take_all(queue, completions);
    uint64_t started[JOBS], finished[JOBS];
    for (int i = 0; i < JOBS; ++i) {
        started[completions[i].user_data] = completions[i].started_ns;
        finished[completions[i].user_data] = completions[i].finished_ns;
    }
    for (int i = 0; i < JOBS; ++i) {
        int unfinished = 0;
        for (int before = 0; before < i; ++before) unfinished += finished[before] > started[i];
        CHECK(unfinished <= 2);
    }
    CHECK_OK(kvf_engine_destroy(engine));
    CHECK_OK(kvf_queue_destroy(queue));
    return 0;
}
