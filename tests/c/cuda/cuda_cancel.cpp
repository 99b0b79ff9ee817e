// Cancelling at every stage: the job ends soon, once, and nothing touches its memory afterwards.
#include "cuda.hpp"

namespace {

void while_it_follows_a_stream(kvf_engine engine, Random &random) {
    const Bytes content = random_bytes(random, 100'000);
    const DeviceMemory memory(content);
    const Buffer buffer(engine, Kind::Pool, memory.bytes());
    const Stream stream;
    Barrier barrier;
    barrier.close(stream);
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.flags = KVF_SUBMIT_FOLLOW_STREAM;
    options.stream = stream.number();
    const Regions regions = {{memory.address(), memory.bytes(), 1, 0, 0, 0}};
    const kvf_job job = start(engine, Way::Load, regions, buffer, options);
    CHECK_OK(kvf_job_cancel(job));
    const kvf_completion completion = finish(job);
    CHECK(completion.status == KVF_ERR_CANCELLED && completion.started_ns == 0);
    barrier.open();
    stream.synchronize();
    CHECK(memory.read() == content);
}

// `what` is held while a job is cancelled, and another that waits behind it.
void while_the_device_works(kvf_engine engine, Random &random, const char *what, Style style,
                            Way way, Kind kind) {
    const Driver &d = driver();
    const uint64_t room = 2 * MiB;
    const Plan plan = make_plan(random, style, room);
    const DeviceMemory device(random_bytes(random, room)), other(random_bytes(random, room));
    const Buffer buffer(engine, kind, plan.buffer_bytes);
    const Buffer other_buffer(engine, kind, plan.buffer_bytes);
    d.hold(what, 1, 1);
    const kvf_job job = start(engine, way, plan.at(device.address()), buffer);
    CHECK(d.wait_held(1, 20'000));
    const kvf_job waiting = start(engine, way, plan.at(other.address()), other_buffer);
    CHECK_OK(kvf_job_cancel(waiting));
    CHECK_OK(kvf_job_cancel(job));
    sleep_ms(3);
    CHECK(!has_ended(job)); // the device is still at it
    d.release();
    CHECK(finish(job).status == KVF_ERR_CANCELLED);
    CHECK(finish(waiting).status == KVF_ERR_CANCELLED);
    const Bytes left = device.read();
    buffer.fill(0x55);
    sleep_ms(3);
    CHECK(device.read() == left);
    CHECK(buffer.holds(Bytes(buffer.bytes(), 0x55)));
}

void at_any_moment(kvf_engine engine, Random &random) {
    const kvf_queue queue = make_queue();
    const uint64_t room = 2 * MiB;
    for (unsigned i = 0; i < 56; ++i) {
        const Way way = i % 2 ? Way::Load : Way::Save;
        const Plan plan = make_plan(random, kStyles[i % 7], room);
        Bytes memory = random_bytes(random, room);
        Bytes expected = random_bytes(random, plan.buffer_bytes);
        const DeviceMemory device(memory);
        const Buffer buffer(engine, kKinds[i / 2 % 4], plan.buffer_bytes);
        buffer.fill(expected);
        model(plan, way, memory, expected);

        kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
        options.queue = queue;
        options.priority = i / 4 % 2;
        const kvf_job job = start(engine, way, plan.at(device.address()), buffer, options);
        const int64_t until = clock_ns() + static_cast<int64_t>(between(random, 0, 3'000'000));
        while (clock_ns() < until) {
        }
        CHECK_OK(kvf_job_cancel(job));
        const kvf_completion completion = finish(job);
        CHECK(completion.status == KVF_OK || completion.status == KVF_ERR_CANCELLED);
        if (completion.status == KVF_OK) {
            CHECK(device.read() == memory);
            CHECK(buffer.holds(expected));
        }
        const Bytes left = device.read();
        buffer.fill(0x55);
        kvf_completion taken[2];
        CHECK(kvf_queue_take(queue, taken, sizeof *taken, 2, 2 * MILLISECONDS) == 1);
        CHECK(device.read() == left);
        CHECK(buffer.holds(Bytes(buffer.bytes(), 0x55)));
    }
    CHECK_OK(kvf_queue_destroy(queue));
}

} // namespace

int main() {
    Random random(7);
    const Context context;
    const Holdings holdings;
    Engine engine;
    while_it_follows_a_stream(engine, random);
    if (driver().simulated()) {
        for (const Kind kind : kKinds) {
            for (const Way way : {Way::Save, Way::Load}) {
                while_the_device_works(engine, random, "copy", Style::Long, way, kind);
                while_the_device_works(engine, random, "copy", Style::Blocks, way, kind);
                while_the_device_works(engine, random, "copy", Style::Runs, way, kind);
                while_the_device_works(engine, random, "kernel", Style::Runs, way, kind);
            }
        }
    }
    at_any_moment(engine, random);
    engine.destroy();
    holdings.check_same();
    return 0;
}
