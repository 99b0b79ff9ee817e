// An engine with CUDA devices moves regions of host memory too, pinned or not.
#include "cuda.hpp"

int main() {
    Random random(4);
    const uint64_t room = 2 * MiB;
    const Context context;
    const Holdings holdings;
    Engine engine;
    for (const Kind memory_kind : kKinds) {
        for (const Kind buffer_kind : kKinds) {
            const Plan plan = make_plan(random, Style::Mixed, room);
            const Buffer memory(engine, memory_kind, room, 5);
            const Buffer buffer(engine, buffer_kind, plan.buffer_bytes, 3);
            const Regions regions = plan.at(reinterpret_cast<uint64_t>(memory.data()));
            Bytes content = random_bytes(random, room), expected(plan.buffer_bytes);

            memory.fill(content);
            buffer.fill(0);
            model(plan, Way::Save, content, expected);
            succeed(start(engine, Way::Save, regions, buffer));
            CHECK(buffer.holds(expected));

            expected = random_bytes(random, plan.buffer_bytes);
            buffer.fill(expected);
            model(plan, Way::Load, content, expected);
            succeed(start(engine, Way::Load, regions, buffer));
            CHECK(memory.holds(content));
        }
    }
    engine.destroy();
    holdings.check_same();
    return 0;
}
