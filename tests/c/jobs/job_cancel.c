/* Cancelling ends a job soon, before and while it moves, once; too late or twice is allowed. */
#include "check.h"

static const kvf_completion *wait_for(kvf_job job) {
    static kvf_completion completion;
    CHECK_OK(kvf_job_wait(job, 20 * SECONDS, &completion, sizeof completion));
    CHECK_OK(kvf_job_release(job));
    return &completion;
}

int main(void) {
    const kvf_engine engine = make_engine();
    const kvf_queue queue = make_queue();
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.queue = queue;

    const kvf_job moving = start_long_job(engine, &options);
    const kvf_job waiting = start_long_job(engine, &options);
    sleep_ms(10);
    CHECK_OK(kvf_job_cancel(waiting));
    CHECK_OK(kvf_job_cancel(waiting));
    CHECK(wait_for(waiting)->status == KVF_ERR_CANCELLED);
    CHECK(kvf_job_poll(moving, NULL, 0) == 0); /* the other goes on */
    CHECK_OK(kvf_job_cancel(moving));
    const kvf_completion *completion = wait_for(moving);
    CHECK(completion->status == KVF_ERR_CANCELLED && completion->started_ns > 0);

    kvf_completion taken[3];
    CHECK(kvf_queue_take(queue, taken, sizeof taken[0], 3, 0) == 2);

    /* Too late: the outcome stays. */
    static char from[64], to[64];
    const kvf_region region = plain_region(from, sizeof from, 0);
    kvf_job job;
    CHECK_OK(kvf_regions_save(engine, &region, 1, to, sizeof to, &options, &job));
    CHECK_OK(kvf_job_wait(job, KVF_FOREVER, NULL, 0));
    CHECK_OK(kvf_job_cancel(job));
    CHECK_OK(kvf_engine_cancel(engine));
    CHECK(wait_for(job)->status == KVF_OK);
    CHECK(kvf_queue_take(queue, taken, sizeof taken[0], 3, 0) == 1);
    CHECK_STATUS(KVF_ERR_INVALID_HANDLE, kvf_job_cancel(job));

    /* Every job of the engine, at any state of progress, and none of another engine. */
    const kvf_engine other = make_engine();
    static unsigned char others_buffer[LONG_JOB_BYTES];
    const kvf_job others = start_long_job_into(others_buffer, other, NULL);
    kvf_job jobs[8];
    for (int i = 0; i < 8; ++i) {
        jobs[i] = start_long_job(engine, &options);
    }
    CHECK_OK(kvf_engine_cancel(engine));
    for (int i = 0; i < 8; ++i) CHECK(wait_for(jobs[i])->status == KVF_ERR_CANCELLED);
    CHECK(kvf_job_poll(others, NULL, 0) == 0);
    CHECK_OK(kvf_job_cancel(others));
    CHECK(wait_for(others)->status == KVF_ERR_CANCELLED);
    CHECK_OK(kvf_engine_destroy(other));
    CHECK_OK(kvf_engine_destroy(engine));
    CHECK_OK(kvf_queue_destroy(queue));
    return 0;
}
