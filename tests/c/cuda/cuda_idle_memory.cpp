// Memory of the library's own goes back to the system when nobody has wanted it for a while,
// without any call, and at once with kvf_buffer_trim(); an idle buffer of the pool makes room for
// one of another size.
#include "cuda.hpp"

namespace {

constexpr uint64_t kRoom = 8 * MiB;

void use_all_of_it(Engine &engine, Random &random, const DeviceMemory &device) {
    const Plan plan = make_plan(random, Style::CellsAtRandom, kRoom, 100'000);
    const Buffer buffer(engine, Kind::Pageable, plan.buffer_bytes),
        pooled(engine, Kind::Pool, kRoom);
    for (const Way way : {Way::Save, Way::Load}) {
        succeed(start(engine, way, plan.at(device.address()), buffer));
    }
}

bool has_gone(uint64_t pinned, uint64_t on_device) {
    return driver().count("pinned_bytes") == pinned && driver().count("device_bytes") == on_device;
}

} // namespace

int main() {
    setenv("KVFERRY_IDLE_SECONDS", "1", 1);
    need_simulation();
    Driver &d = driver();
    Random random(24);
    const Context context;
    const Holdings holdings;
    Engine engine;
    {
        const DeviceMemory device(random_bytes(random, kRoom));
        const uint64_t pinned = d.count("pinned_bytes"), on_device = d.count("device_bytes");
        use_all_of_it(engine, random, device);
        CHECK(!has_gone(pinned, on_device));
        CHECK_OK(kvf_buffer_trim(engine));
        CHECK(has_gone(pinned, on_device) && engine.describes("\"pinned_bytes\": 0,"));

        for (int i = 0; i < 2; ++i) {
            use_all_of_it(engine, random, device);
            const int64_t begin = clock_ns();
            while (!has_gone(pinned, on_device)) {
                CHECK(clock_ns() - begin < 20 * SECONDS);
                sleep_ms(10);
            }
            CHECK(clock_ns() - begin > SECONDS / 2);
        }

        // A buffer that was freed after everything else had gone to sleep.
        void *buffer;
        CHECK_OK(kvf_buffer_alloc(engine, kRoom, &buffer));
        sleep_ms(1500);
        CHECK(!has_gone(pinned, on_device));
        CHECK_OK(kvf_buffer_free(buffer));
        sleep_ms(2500);
        CHECK(has_gone(pinned, on_device));

        CHECK_OK(kvf_buffer_alloc(engine, 2 * kRoom, &buffer));
        CHECK_OK(kvf_buffer_free(buffer));
        d.set("pinned_limit", d.count("pinned_bytes") + kRoom / 2);
        CHECK_OK(kvf_buffer_alloc(engine, kRoom, &buffer));
        CHECK_OK(kvf_buffer_free(buffer));
    }
    engine.destroy();
    holdings.check_same();
    return 0;
}
