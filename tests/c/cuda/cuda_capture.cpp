// While another thread captures a CUDA graph in global mode, kvferry calls nothing that would break
// the capture.
#include "cuda.hpp"

int main() {
    need_simulation();
    const Driver &d = driver();
    Random random(10);
    const uint64_t room = 2 * MiB;
    const Context context;
    const Holdings holdings;
    {
        const Plan plan = make_plan(random, Style::Mixed, room);
        const DeviceMemory device(random_bytes(random, room));
        const Regions regions = plan.at(device.address());
        const Stream stream;
        d.begin_capture();
        Engine engine;
        for (const Kind kind : {Kind::Pool, Kind::Registered, Kind::Pageable}) {
            const Buffer buffer(engine, kind, plan.buffer_bytes);
            kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
            options.flags = KVF_SUBMIT_FOLLOW_STREAM;
            options.stream = stream.number();
            const kvf_job job = start(engine, Way::Save, regions, buffer, options);
            CHECK_OK(kvf_job_stream_wait(job, stream.number()));
            succeed(job);
            succeed(start(engine, Way::Load, regions, buffer));
        }
        engine.destroy();
        // A caller's thread is left in the mode that it was in.
        CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
        CHECK_CUDA(d.cuThreadExchangeStreamCaptureMode(&mode));
        CHECK(mode == CU_STREAM_CAPTURE_MODE_GLOBAL);
        CHECK_CUDA(d.cuThreadExchangeStreamCaptureMode(&mode));
        d.end_capture();
    }
    holdings.check_same();
    return 0;
}
