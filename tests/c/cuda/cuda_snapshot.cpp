// A snapshot holds what memory held when it was taken, whatever is written there before it has
// moved; without room for it, it fails and nothing has happened.
#include "inside.hpp"

namespace {

void save_by_snapshot(const std::shared_ptr<kvf::Engine> &engine, const Plan &plan,
                      const DeviceMemory &device, const Buffer &buffer) {
    kvf::LayoutBuilder builder;
    for (const kvf_region &region : plan.at(device.address())) builder.add(region);
    const kvf::Layout layout = builder.finish();
    auto snapshot = engine->device(1).snapshot(layout, buffer.data());
    CHECK(snapshot.layout.bytes == layout.bytes);
    device.write(Bytes(device.bytes(), 0xEE));
    save_snapshot(*engine, std::move(snapshot), buffer);
}

bool is_out_of_memory(const std::shared_ptr<kvf::Engine> &engine, const Plan &plan,
                      const DeviceMemory &device, const Buffer &buffer) {
    try {
        save_by_snapshot(engine, plan, device, buffer);
    } catch (const kvf::Error &error) {
        return error.status == KVF_ERR_OUT_OF_MEMORY;
    }
    return false;
}

} // namespace

int main() {
    Random random(6);
    const uint64_t room = 4 * MiB;
    const Context context;
    const Holdings holdings;
    Driver &d = driver();

    for (const bool kernels : {true, false}) {
        if (!kernels) {
            if (!d.simulated()) break;
            d.fail("cuModuleLoadData", 1, CUDA_ERROR_UNSUPPORTED_PTX_VERSION, 0);
        }
        auto engine = make_cuda_engine();
        for (const Style style : kStyles) {
            const Plan plan = make_plan(random, style, room);
            Bytes memory = random_bytes(random, room), expected(plan.buffer_bytes, 0xAA);
            const DeviceMemory device(memory);
            const Buffer buffer(0, Kind::Foreign, plan.buffer_bytes, 1);
            buffer.fill(0xAA);
            model(plan, Way::Save, memory, expected);
            if (d.simulated()) {
                engine->device(1).trim(); // what the last one left, too
                // Not for the bytes, and not for the kernel's table and its pinned twin.
                const uint64_t taken = d.count("device_bytes"), pinned = d.count("pinned_bytes");
                for (const uint64_t free : {uint64_t{0}, plan.buffer_bytes}) {
                    d.set("device_limit", taken + free);
                    CHECK(is_out_of_memory(engine, plan, device, buffer) || free > 0);
                    device.write(memory);
                }
                d.set("device_limit", UINT64_MAX);
                d.set("pinned_limit", pinned);
                is_out_of_memory(engine, plan, device, buffer);
                device.write(memory);
                d.set("pinned_limit", UINT64_MAX);
                buffer.fill(0xAA);
            }
            save_by_snapshot(engine, plan, device, buffer);
            CHECK(buffer.holds(expected));
        }
        engine->close();
        engine.reset();
        holdings.check_same();
    }
    return 0;
}
