// Regions of every kind, at any alignment, between device memory and every kind of buffer, come out
// as the model says, and nothing beside them is touched.
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
                const Buffer buffer(engine, kind, plan.buffer_bytes, between(random, 0, 300));
                const kvf_completion save =
                    save_and_check(engine, plan, device, memory, buffer, priority);
                CHECK(save.started_ns >= save.submitted_ns && save.finished_ns >= save.started_ns);
                load_and_check(engine, plan, device, memory, buffer, random, priority);
            }
        }
    }
    engine.destroy();
    holdings.check_same();
    return 0;
}
