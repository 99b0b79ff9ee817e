// A job that follows a stream begins when what the stream held at the call is done, and not before;
// others pass it.
#include "cuda.hpp"

namespace {

constexpr uint64_t kBytes = 300'000;

kvf_submit_options following(uint64_t stream) {
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.priority = KVF_PRIORITY_URGENT;
    options.flags = KVF_SUBMIT_FOLLOW_STREAM;
    options.stream = stream;
    return options;
}

void device_memory_follows(kvf_engine engine, Kind kind, const Stream &stream, Random &random) {
    const Bytes before = random_bytes(random, kBytes), after = random_bytes(random, kBytes);
    const DeviceMemory memory(before), source(after);
    Barrier barrier;
    const Buffer buffer(engine, kind, kBytes), other_buffer(engine, kind, kBytes);
    const Regions regions = {{memory.address(), kBytes, 1, 0, 0, 0}};
    // Computes, in its own time, what is to be saved.
    barrier.close(stream);
    CHECK_CUDA(
        driver().cuMemcpyDtoDAsync(memory.address(), source.address(), kBytes, stream.get()));

    const kvf_submit_options options = following(stream.number());
    const kvf_job job = start(engine, Way::Save, regions, buffer, options);
    // One that does not follow goes ahead.
    succeed(start(engine, Way::Save, regions, other_buffer, KVF_PRIORITY_BACKGROUND));
    CHECK(other_buffer.holds(before));
    sleep_ms(5);
    CHECK(!has_ended(job));

    barrier.open();
    const kvf_completion completion = succeed(job);
    CHECK(completion.started_ns > completion.submitted_ns);
    CHECK(buffer.holds(after));
    stream.synchronize();

    // What the stream gets later is not waited for.
    Barrier later;
    const kvf_job second = start(engine, Way::Save, regions, buffer, options);
    later.close(stream);
    succeed(second);
    later.open();
    stream.synchronize();
}

void host_memory_follows(kvf_engine engine, Kind kind, const Stream &stream) {
    static unsigned char host[1000];
    Barrier barrier;
    const Buffer buffer(engine, kind, sizeof host);
    barrier.close(stream);
    const Regions regions = {plain_region(host, sizeof host, 0)};
    const kvf_job job = start(engine, Way::Load, regions, buffer, following(stream.number()));
    sleep_ms(5);
    CHECK(!has_ended(job));
    barrier.open();
    succeed(job);
}

void unknown_stream_is_refused(kvf_engine engine) {
    unsigned char byte;
    const Regions regions = {plain_region(&byte, 1, 0)};
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.flags = KVF_SUBMIT_FOLLOW_STREAM;
    options.stream = 0xdead0;
    unsigned char to;
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT,
                 kvf_regions_save(engine, regions.data(), 1, &to, 1, &options, nullptr));
    const kvf_engine host_engine = make_engine();
    CHECK_STATUS(KVF_ERR_UNSUPPORTED,
                 kvf_regions_save(host_engine, regions.data(), 1, &to, 1, &options, nullptr));
    CHECK_OK(kvf_engine_destroy(host_engine));
}

} // namespace

int main() {
    Random random(5);
    const Context context;
    const Holdings holdings;
    Engine engine;
    for (const Kind kind : kKinds) {
        const Stream stream;
        device_memory_follows(engine, kind, stream, random);
        host_memory_follows(engine, kind, stream);
    }
    // A real driver may crash on a stream that was made up.
    if (driver().simulated()) unknown_stream_is_refused(engine);
    engine.destroy();
    holdings.check_same();
    return 0;
}
