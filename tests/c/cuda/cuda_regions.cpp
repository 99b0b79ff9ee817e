// Regions of every kind, at any alignment, between device memory and every kind of buffer, come out as the
// model says, and nothing beside them is touched.
#include "cuda.hpp"

int main(int argc, char **argv) {
    Random random(argc > 1 ? strtoull(argv[1], nullptr, 10) : 1);
    const Context context;
    const Holdings holdings;
    const uint64_t room = driver().simulated() ? 6 * MiB : 48 * MiB;
    Engine engine;
    for (const Style style : kStyles) {
        for (const Kind kind : kKinds) {
            for (const uint32_t priority : {KVF_PRIORITY_BACKGROUND, KVF_PRIORITY_URGENT}) {
                const Plan plan = make_plan(random, style, room);
                Bytes memory = random_bytes(random, room);
                const DeviceMemory device(memory);
                const Regions regions = plan.at(device.address());
                const Buffer buffer(engine, kind, plan.buffer_bytes, between(random, 0, 300));
                Bytes expected(plan.buffer_bytes, 0xAA);

                buffer.fill(0xAA);
                model(plan, Way::Save, memory, expected);
                const kvf_completion save =
                    succeed(start(engine, Way::Save, regions, buffer, priority));
                CHECK(buffer.holds(expected));
                CHECK(save.started_ns >= save.submitted_ns && save.finished_ns >= save.started_ns);

                expected = random_bytes(random, plan.buffer_bytes);
                buffer.fill(expected);
                model(plan, Way::Load, memory, expected);
                succeed(start(engine, Way::Load, regions, buffer, priority));
                CHECK(device.read() == memory);
                CHECK(buffer.holds(expected));
            }
        }
    }
    engine.destroy();
    holdings.check_same();
    return 0;
}
