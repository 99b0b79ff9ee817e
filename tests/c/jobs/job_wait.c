/* A job can be polled and waited for, with and without a limit of time, from several threads at
 * once. */
#include <pthread.h>

#include "check.h"

static void *wait_cancelled(void *job) {
    kvf_completion completion;
    CHECK_OK(kvf_job_wait(*(kvf_job *)job, KVF_FOREVER, &completion, sizeof completion));
    CHECK(completion.status == KVF_ERR_CANCELLED && completion.job == *(kvf_job *)job);
    return NULL;
}

static void *wait_long(void *job) {
    CHECK_OK(kvf_job_wait(*(kvf_job *)job, INT64_MAX, NULL, 0));
    return NULL;
}

int main(void) {
    const kvf_engine engine = make_engine();
    kvf_job job = start_long_job(engine, NULL);
    kvf_completion completion = {.status = 77};
    CHECK(kvf_job_poll(job, &completion, sizeof completion) == 0);
    CHECK_STATUS(KVF_ERR_TIMEOUT, kvf_job_wait(job, 0, &completion, sizeof completion));
    const int64_t begin = clock_ns();
    CHECK_STATUS(KVF_ERR_TIMEOUT,
                 kvf_job_wait(job, 20 * MILLISECONDS, &completion, sizeof completion));
    CHECK(clock_ns() - begin >= 20 * MILLISECONDS);
    CHECK(completion.status == 77); /* not written */

    pthread_t waiters[3];
    for (int i = 0; i < 3; ++i) {
        CHECK(pthread_create(&waiters[i], NULL, i == 2 ? wait_long : wait_cancelled, &job) == 0);
    }
    sleep_ms(20);
    CHECK_OK(kvf_job_cancel(job));
    for (int i = 0; i < 3; ++i) CHECK(pthread_join(waiters[i], NULL) == 0);
    CHECK(kvf_job_poll(job, &completion, sizeof completion) == 1);
    CHECK(completion.status == KVF_ERR_CANCELLED);
    CHECK(completion.bytes == (uint64_t)LONG_JOB_BYTES * LONG_JOB_REGIONS);
    CHECK(completion.fragments == LONG_JOB_REGIONS);
    CHECK_OK(kvf_job_wait(job, 0, NULL, 0)); /* as often as you like */
    CHECK_OK(kvf_job_release(job));

    /* No regions: ended at once. */
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.user_data = UINT64_C(0xfedcba9876543210);
    CHECK_OK(kvf_regions_save(engine, NULL, 0, NULL, 0, &options, &job));
    CHECK(kvf_job_poll(job, &completion, sizeof completion) == 1);
    CHECK(completion.status == KVF_OK && completion.bytes == 0 && completion.started_ns == 0);
    CHECK(completion.user_data == UINT64_C(0xfedcba9876543210) && completion.mode == 0);
    CHECK_OK(kvf_job_release(job));
    CHECK_OK(kvf_engine_destroy(engine));
    return 0;
}
