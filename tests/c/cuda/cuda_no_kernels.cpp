// A driver that refuses the kernels' PTX: the engine says so, and every layout comes out right
// without them.
#include "cuda.hpp"

int main() {
    need_simulation();
    const Driver &d = driver();
    Random random(13);
    const uint64_t room = 1 * MiB;
    const Context context;
    const Holdings holdings;
    d.fail("cuModuleLoadData", 1, CUDA_ERROR_UNSUPPORTED_PTX_VERSION, 1);
    Engine engine;
    CHECK(engine.describes("\"kernels\": false"));
    CHECK(engine.describes("CUDA_ERROR_UNSUPPORTED_PTX_VERSION"));
    for (const Style style : kStyles) {
        for (const Kind kind : {Kind::Pool, Kind::Pageable}) {
            const Plan plan = make_plan(random, style, room, 300);
            Bytes memory = random_bytes(random, room);
            const DeviceMemory device(memory);
            const Buffer buffer(engine, kind, plan.buffer_bytes, 7);
            save_and_check(engine, plan, device, memory, buffer);
            load_and_check(engine, plan, device, memory, buffer, random);
        }
    }
    CHECK(d.count("kernels") == 0);
    engine.destroy();
    holdings.check_same();
    return 0;
}
