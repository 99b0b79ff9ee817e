/* A queue is not destroyed under jobs that would complete into it. It outlives engines. */
#include "check.h"

int main(void) {
    kvf_queue queue = make_queue();
    const kvf_engine engine = make_engine();
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.queue = queue;
    const kvf_job job = start_long_job(engine, &options);
    CHECK_STATUS(KVF_ERR_BUSY, kvf_queue_destroy(queue));
    CHECK(kvf_queue_fd(queue) >= 0); /* and nothing has changed */
    CHECK_OK(kvf_job_cancel(job));
    CHECK_OK(kvf_job_wait(job, KVF_FOREVER, NULL, 0));
    CHECK_OK(kvf_job_release(job));
    CHECK_OK(kvf_engine_destroy(engine));
    kvf_completion completion;
    CHECK(kvf_queue_take(queue, &completion, sizeof completion, 1, 0) == 1);
    CHECK(completion.job == job && completion.status == KVF_ERR_CANCELLED);
    CHECK_OK(kvf_queue_destroy(queue));

    /* Whoever has the completion, by whichever way, may destroy the queue. */
    static char from[64], to[64];
    const kvf_region region = plain_region(from, sizeof from, 0);
    const kvf_engine other = make_engine();
    for (int i = 0; i < 5000; ++i) {
        queue = make_queue();
        options.queue = queue;
        options.priority = (uint32_t)(i & 1);
        kvf_job handle;
        CHECK_OK(kvf_regions_save(other, &region, 1, to, sizeof to, &options, &handle));
        if (i % 3 == 0) {
            while (kvf_job_poll(handle, NULL, 0) == 0) {
            }
        } else if (i % 3 == 1) {
            CHECK_OK(kvf_job_wait(handle, KVF_FOREVER, NULL, 0));
        } else {
            CHECK(kvf_queue_take(queue, &completion, sizeof completion, 1, KVF_FOREVER) == 1);
            CHECK(kvf_job_poll(handle, NULL, 0) == 1); /* all ways agree */
        }
        CHECK_OK(kvf_job_release(handle));
        CHECK_OK(kvf_queue_destroy(queue));
    }
    CHECK_OK(kvf_engine_destroy(other));
    return 0;
}
