// With little device memory staging is smaller, and with none rows are copied one by one: slower,
// and right.
#include "cuda.hpp"

int main() {
    need_simulation();
    Driver &d = driver();
    Random random(11);
    const uint64_t room = 2 * MiB;
    const Context context;
    for (const uint64_t free : {uint64_t{0}, 1 * MiB, 3 * MiB, 9 * MiB}) {
        d.reset();
        const DeviceMemory device(room);
        Engine engine;
        d.set("device_limit", d.count("device_bytes") + free);
        for (const Style style : {Style::Runs, Style::CellsAtRandom, Style::Narrow, Style::Mixed}) {
            for (const Kind kind : {Kind::Pool, Kind::Pageable}) {
                const Plan plan = make_plan(random, style, room, 500);
                Bytes memory = random_bytes(random, room);
                const Buffer buffer(engine, kind, plan.buffer_bytes);
                device.write(memory);
                save_and_check(engine, plan, device, memory, buffer);
                load_and_check(engine, plan, device, memory, buffer, random,
                               KVF_PRIORITY_BACKGROUND);
            }
        }
        CHECK((d.count("kernels") > 0) == (free > 0));
        engine.destroy();
        // All but the memory that this test still has.
        CHECK(d.count("device_bytes") == room);
    }
    return 0;
}
