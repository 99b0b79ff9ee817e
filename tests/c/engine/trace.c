/* The trace accounts for every byte of a job, in pieces that lie within its time. */
#include "check.h"

int main(void) {
    kvf_engine_options options = KVF_ENGINE_OPTIONS_INIT;
    options.devices = KVF_DEVICES_HOST;
    options.flags = KVF_ENGINE_TRACE;
    kvf_engine engine;
    CHECK_OK(kvf_engine_create(&options, &engine));
    static char from[20 << 20], to[20 << 20];
    const kvf_region region = plain_region(from, sizeof from, 0);
    for (uint32_t direction = 0; direction < 2; ++direction) {
        kvf_submit_options submit = KVF_SUBMIT_OPTIONS_INIT;
        submit.user_data = 5 + direction;
        submit.priority = direction;
        kvf_job job;
        kvf_completion completion;
        CHECK_OK((direction ? kvf_regions_load(engine, &region, 1, to, sizeof to, &submit, &job)
                            : kvf_regions_save(engine, &region, 1, to, sizeof to, &submit, &job)));
        CHECK_OK(kvf_job_wait(job, KVF_FOREVER, &completion, sizeof completion));
        CHECK_OK(kvf_job_release(job));
        kvf_trace_event events[7];
        uint64_t bytes = 0;
        int32_t n;
        while ((n = kvf_engine_trace(engine, events, sizeof events[0], 7)) > 0) {
            for (int32_t i = 0; i < n; ++i) {
                CHECK(events[i].job == job && events[i].user_data == 5 + direction);
                CHECK(events[i].direction == direction && events[i].device == 0);
                CHECK(events[i].begin_ns >= completion.started_ns);
                CHECK(events[i].begin_ns <= events[i].end_ns);
                CHECK(events[i].end_ns <= completion.finished_ns);
                bytes += events[i].bytes;
            }
        }
        CHECK(n == 0 && bytes == sizeof from);
    }
    CHECK(kvf_engine_trace(engine, NULL, sizeof(kvf_trace_event), 0) == 0);
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_engine_trace(engine, NULL, 56, 1));
    CHECK_STATUS(KVF_ERR_STRUCT_SIZE, kvf_engine_trace(engine, NULL, 0, 0));
    CHECK_OK(kvf_engine_destroy(engine));

    engine = make_engine();
    CHECK_STATUS(KVF_ERR_UNSUPPORTED, kvf_engine_trace(engine, NULL, sizeof(kvf_trace_event), 0));
    CHECK_OK(kvf_engine_destroy(engine));
    return 0;
}
