// A save by snapshot completes while the device is busy with other work, whether or not the driver
// frees in the order of streams; and memory that a snapshot has left is there for the next one.
#include "inside.hpp"

namespace {

constexpr uint64_t kRoom = 4 * MiB;

kvf::Layout whole(const DeviceMemory &device) {
    kvf::LayoutBuilder builder;
    builder.add({device.address(), device.bytes(), 1, 0, 0, 0});
    return builder.finish();
}

void save_by_snapshot(kvf::Engine &engine, const DeviceMemory &device, const Buffer &buffer) {
    save_snapshot(engine, engine.device(1).snapshot(whole(device), buffer.data()), buffer,
                  20 * SECONDS);
}

void save_on_a_busy_device(Random &random, bool pools) {
    Driver &d = driver();
    d.set("memory_pools", pools);
    const auto engine = make_cuda_engine();
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
        const auto job =
            kvf::submit_job(*engine, make_submission(Way::Save, buffer.data(), buffer.bytes()),
                            make_recorded(1, whole(device)), KVF_SUBMIT_OPTIONS_INIT, nullptr);
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
