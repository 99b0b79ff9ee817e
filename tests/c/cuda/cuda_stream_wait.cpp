// A stream that waits for a job goes on when the job has ended, in whatever way.
#include "cuda.hpp"

int main() {
    const uint64_t bytes = 100'000;
    const Context context;
    const Holdings holdings;
    Engine engine;
    {
        const DeviceMemory memory(bytes);
        const Buffer buffer(engine, Kind::Pool, bytes);
        const Regions regions = {{memory.address(), bytes, 1, 0, 0, 0}};
        const Stream before, after, also_after;
        for (const bool cancelled : {false, true}) {
            Barrier barrier;
            barrier.close(before);
            kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
            options.flags = KVF_SUBMIT_FOLLOW_STREAM;
            options.stream = before.number();
            const kvf_job job = start(engine, Way::Load, regions, buffer, options);
            CHECK_OK(kvf_job_stream_wait(job, after.number()));
            CHECK_OK(kvf_job_stream_wait(job, also_after.number()));
            sleep_ms(5);
            CHECK(!after.is_idle() && !also_after.is_idle());
            if (cancelled) {
                CHECK_OK(kvf_job_cancel(job));
            } else {
                barrier.open();
            }
            after.synchronize();
            also_after.synchronize();
            CHECK(has_ended(job));
            // One that has ended is not waited for.
            CHECK_OK(kvf_job_stream_wait(job, after.number()));
            after.synchronize();
            CHECK(finish(job).status == (cancelled ? KVF_ERR_CANCELLED : KVF_OK));
            barrier.open();
            before.synchronize();
        }
        // More waits than there are places, one after another.
        for (int i = 0; i < 1500; ++i) {
            const kvf_job job = start(engine, Way::Save, regions, buffer);
            CHECK_OK(kvf_job_stream_wait(job, after.number()));
            succeed(job);
            if (i % 500 == 0) after.synchronize();
        }
        after.synchronize();
        if (driver().simulated()) {
            const kvf_job job = start(engine, Way::Save, regions, buffer);
            CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_job_stream_wait(job, 0xdead0));
            succeed(job);
        }
    }
    engine.destroy();
    holdings.check_same();
    return 0;
}
