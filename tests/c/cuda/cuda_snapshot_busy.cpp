// A save by snapshot completes while the device is busy with other work, whether or not the driver frees in the order
// of streams; and memory that a snapshot has left is there for the next one.
#include "engine/open_job.h"
#include "memory/layout_builder.h"

#include "cuda.hpp"

namespace {

constexpr uint64_t kRoom = 4 * MiB;

kvf::Layout whole(const DeviceMemory &device) {
    kvf::LayoutBuilder builder;
    builder.add({device.address(), device.bytes(), 1, 0, 0, 0});
    return builder.finish();
}

void save_by_snapshot(kvf::Engine &engine, const DeviceMemory &device, const Buffer &buffer) {
    auto snapshot = engine.device(1).snapshot(whole(device), buffer.data());
    kvf::Submission submission;
    submission.buffer = buffer.data();
    submission.buffer_bytes = buffer.bytes();
    kvf::Recorded recorded;
    recorded.layouts.emplace_back(1, std::move(snapshot.layout));
    submission.keep_alive.push_back(std::move(snapshot.memory));
    const kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    const auto job =
        kvf::submit_job(engine, std::move(submission), std::move(recorded), options, nullptr);
    kvf_completion completion;
    CHECK(job->wait(20 * SECONDS, &completion));
    CHECK_OK(completion.status);
}

void save_on_a_busy_device(Random &random, bool pools) {
    Driver &d = driver();
    d.set("memory_pools", pools);
    kvf_engine_options options = KVF_ENGINE_OPTIONS_INIT;
    options.devices = KVF_DEVICES_CUDA;
    const auto engine = std::make_shared<kvf::Engine>(options);
    const Bytes content = random_bytes(random, kRoom);
    const DeviceMemory device(content);
    const Buffer buffer(0, Kind::Foreign, kRoom);
    const Stream decoding;
    {
        Barrier barrier;
        barrier.close(decoding);
        save_by_snapshot(*engine, device, buffer);
        CHECK(buffer.holds(content));
        // The lane goes on, too.
        buffer.fill(0);
        kvf::Submission submission;
        submission.buffer = buffer.data();
        submission.buffer_bytes = buffer.bytes();
        kvf::Recorded recorded;
        recorded.layouts.emplace_back(1, whole(device));
        const kvf_submit_options submit = KVF_SUBMIT_OPTIONS_INIT;
        const auto job =
            kvf::submit_job(*engine, std::move(submission), std::move(recorded), submit, nullptr);
        CHECK(job->wait(20 * SECONDS, nullptr));
        CHECK(buffer.holds(content));
        barrier.open();
        decoding.synchronize();
    }
    // With room for one.
    d.set("device_limit", 2 * kRoom + MiB);
    for (int i = 0; i < 20; ++i) save_by_snapshot(*engine, device, buffer);
    d.set("device_limit", UINT64_MAX);
    CHECK((d.calls("cuMemFreeAsync") > 0) == pools);
    engine->close();
}

} // namespace

int main() {
    need_simulation();
    Random random(25);
    const Context context;
    const Holdings holdings;
    for (const bool pools : {true, false}) {
        driver().reset();
        save_on_a_busy_device(random, pools);
        holdings.check_same();
    }
    return 0;
}
