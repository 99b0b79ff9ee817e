// A copy that never ends: after a while the device is given up, the jobs end, and the engine can be
// destroyed.
#include "cuda.hpp"

int main() {
    setenv("KVFERRY_STUCK_SECONDS", "1", 1);
    need_simulation();
    const Driver &d = driver();
    const uint64_t bytes = MiB;
    const Context context;
    Engine engine;
    const DeviceMemory device(bytes);
    const Regions regions = {{device.address(), bytes, 1, 0, 0, 0}};
    const Stream after;
    {
        const Buffer pooled(engine, Kind::Pool, bytes), pageable(engine, Kind::Pageable, bytes);
        d.hold("copy", 1, 1);
        const kvf_job save = start(engine, Way::Save, regions, pooled);
        const kvf_job second = start(engine, Way::Save, regions, pageable);
        const kvf_job load = start(engine, Way::Load, regions, pageable);
        CHECK_OK(kvf_job_stream_wait(save, after.number()));
        for (const kvf_job job : {save, second, load}) {
            const kvf_completion completion = finish(job);
            CHECK(completion.status == KVF_ERR_DEVICE_LOST);
            CHECK(strstr(completion.detail, "did not end"));
        }
        CHECK(engine.describes("\"broken\": true"));
    }
    CHECK_OK(kvf_buffer_trim(engine));
    const int64_t begin = clock_ns();
    engine.destroy();
    CHECK(clock_ns() - begin < 5 * SECONDS);
    exit(0); // to free the memory that this test has would wait for the copy
}
