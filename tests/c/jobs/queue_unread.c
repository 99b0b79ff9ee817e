/* Nobody takes: completions wait, nothing is lost, other jobs and the engine's end are not
 * held up. */
#include "check.h"

int main(void) {
    enum { JOBS = 20000 };
    const kvf_engine engine = make_engine();
    const kvf_queue unread = make_queue();
    static char from[64], to[64];
    const kvf_region region = plain_region(from, sizeof from, 0);
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.queue = unread;
    for (uint64_t i = 0; i < JOBS; ++i) {
        options.user_data = i;
        CHECK_OK(kvf_regions_save(engine, &region, 1, to, sizeof to, &options, NULL));
    }
    CHECK_OK(kvf_engine_destroy(engine)); /* waits for them all */
    kvf_completion completions[100];
    for (uint64_t i = 0; i < JOBS; i += 100) {
        CHECK(kvf_queue_take(unread, completions, sizeof completions[0], 100, 0) == 100);
        /* One thread moves background jobs, in the order of their submission. */
        for (uint64_t j = 0; j < 100; ++j) CHECK(completions[j].user_data == i + j);
    }
    CHECK_OK(kvf_queue_destroy(unread));

    /* A queue that still holds completions may be destroyed. */
    const kvf_engine second = make_engine();
    options.queue = make_queue();
    CHECK_OK(kvf_regions_save(second, &region, 1, to, sizeof to, &options, NULL));
    CHECK_OK(kvf_engine_destroy(second));
    CHECK_OK(kvf_queue_destroy(options.queue));
    return 0;
}
