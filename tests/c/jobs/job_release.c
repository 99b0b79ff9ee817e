/* Handles are released in any order, before and after the end; every job completes. */
#include "check.h"

int main(void) {
    enum { JOBS = 64 };
    const kvf_engine engine = make_engine();
    const kvf_queue queue = make_queue();
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.queue = queue;

    /* Before the end. Only the engine can cancel it then. */
    kvf_job job = start_long_job(engine, &options);
    CHECK_OK(kvf_job_release(job));
    CHECK_STATUS(KVF_ERR_INVALID_HANDLE, kvf_job_cancel(job));
    CHECK_OK(kvf_engine_cancel(engine));
    kvf_completion completion;
    CHECK(kvf_queue_take(queue, &completion, sizeof completion, 1, KVF_FOREVER) == 1);
    CHECK(completion.job == job && completion.status == KVF_ERR_CANCELLED);

    static char from[4096], to[JOBS][4096];
    const kvf_region region = plain_region(from, sizeof from, 0);
    int seen[JOBS] = {0};
    for (int round = 0; round < 200; ++round) {
        kvf_job jobs[JOBS];
        memset(seen, 0, sizeof seen);
        for (int i = 0; i < JOBS; ++i) {
            options.user_data = (uint64_t)i;
            options.priority = (uint32_t)(i % 2);
            CHECK_OK(kvf_regions_save(engine, &region, 1, to[i], sizeof to[i], &options, &jobs[i]));
        }
        for (int i = 0; i < JOBS; ++i) {
            const int other = (i * 37 + round) % JOBS;
            CHECK_OK(kvf_job_release(jobs[other]));
        }
        for (int left = JOBS; left > 0; --left) {
            CHECK(kvf_queue_take(queue, &completion, sizeof completion, 1, 20 * SECONDS) == 1);
            CHECK(completion.job == jobs[completion.user_data]);
            CHECK(completion.status == KVF_OK);
            CHECK(++seen[completion.user_data] == 1);
        }
        CHECK(kvf_queue_take(queue, &completion, sizeof completion, 1, 0) == 0);
    }

    /* After the engine's end the handle still tells how it went. */
    CHECK_OK(kvf_regions_save(engine, &region, 1, to[0], sizeof to[0], NULL, &job));
    CHECK_OK(kvf_engine_destroy(engine));
    CHECK(kvf_job_poll(job, &completion, sizeof completion) == 1);
    CHECK(completion.status == KVF_OK);
    CHECK_OK(kvf_job_cancel(job));
    CHECK_OK(kvf_job_release(job));
    CHECK_OK(kvf_queue_destroy(queue));
    return 0;
}
