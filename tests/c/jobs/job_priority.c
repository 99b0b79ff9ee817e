/* Urgent jobs go before background jobs, and background jobs go on afterwards. */
#include "check.h"

int main(void) {
    const kvf_engine engine = make_engine();
    const kvf_job background = start_long_job(engine, NULL);
    static char from[8 << 20], to[8 << 20];
    memset(from, 9, sizeof from);
    const kvf_region region = plain_region(from, sizeof from, 0);
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.priority = KVF_PRIORITY_URGENT;
    for (int i = 0; i < 20; ++i) {
        memset(to, 0, sizeof to);
        kvf_job urgent;
        CHECK_OK(kvf_regions_save(engine, &region, 1, to, sizeof to, &options, &urgent));
        CHECK_OK(kvf_job_wait(urgent, 20 * SECONDS, NULL, 0));
        CHECK_OK(kvf_job_release(urgent));
        CHECK(memcmp(from, to, sizeof to) == 0);
        CHECK(kvf_job_poll(background, NULL, 0) == 0);
    }
    /* What came behind it goes on when it has ended. */
    kvf_job other;
    CHECK_OK(kvf_regions_save(engine, &region, 1, to, sizeof to, NULL, &other));
    CHECK_OK(kvf_job_cancel(background));
    CHECK_OK(kvf_job_wait(other, 20 * SECONDS, NULL, 0));
    CHECK_OK(kvf_job_release(other));
    CHECK_OK(kvf_job_wait(background, KVF_FOREVER, NULL, 0));
    CHECK_OK(kvf_job_release(background));
    CHECK_OK(kvf_engine_destroy(engine));
    return 0;
}
