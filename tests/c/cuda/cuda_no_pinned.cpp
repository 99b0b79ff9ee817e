// Where the system pins no more memory, what wants it is told so, nothing is lost, and later it
// works.
#include "cuda.hpp"

int main() {
    need_simulation();
    Driver &d = driver();
    Random random(12);
    const uint64_t room = 2 * MiB;
    const Context context;
    const Holdings holdings;
    Engine engine;
    {
        const Plan plan = make_plan(random, Style::Mixed, room);
        Bytes memory = random_bytes(random, room), expected(plan.buffer_bytes);
        const DeviceMemory device(memory);
        const Regions regions = plan.at(device.address());
        model(plan, Way::Save, memory, expected);
        const Buffer pageable(engine, Kind::Pageable, plan.buffer_bytes);
        const Buffer pinned(engine, Kind::Foreign, plan.buffer_bytes);
        pinned.fill(0);
        d.set("pinned_limit", d.count("pinned_bytes"));

        void *buffer = nullptr;
        CHECK_STATUS(KVF_ERR_OUT_OF_MEMORY, kvf_buffer_alloc(engine, room, &buffer));
        CHECK(buffer == nullptr && engine.describes("\"mapped\": 0"));
        Bytes own(room);
        CHECK_STATUS(KVF_ERR_OUT_OF_MEMORY, kvf_buffer_register(engine, own.data(), room));
        CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_buffer_unregister(engine, own.data()));

        // There is nowhere for the bytes of a pageable buffer to pass through.
        for (const Way way : {Way::Save, Way::Load}) {
            const kvf_completion completion = finish(start(engine, way, regions, pageable));
            CHECK(completion.status == KVF_ERR_OUT_OF_MEMORY && completion.detail[0]);
        }
        // A pinned one needs none of the library's.
        succeed(start(engine, Way::Save, regions, pinned));
        CHECK(pinned.holds(expected));

        d.set("pinned_limit", UINT64_MAX);
        pageable.fill(0);
        succeed(start(engine, Way::Save, regions, pageable));
        CHECK(pageable.holds(expected));
        CHECK_OK(kvf_buffer_register(engine, own.data(), room));
        CHECK_OK(kvf_buffer_unregister(engine, own.data()));
        CHECK_OK(kvf_buffer_alloc(engine, room, &buffer));
        CHECK_OK(kvf_buffer_free(buffer));
    }
    engine.destroy();
    holdings.check_same();
    return 0;
}
