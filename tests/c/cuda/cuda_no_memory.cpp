// Where a pump is refused memory, whenever that is, the job ends with that, and the next one works.
#include "cuda.hpp"
#include "refuse_memory.hpp"

int main() {
    need_simulation();
    Random random(22);
    const uint64_t room = 6 * MiB;
    const Context context;
    const DeviceMemory device(random_bytes(random, room));
    const Plan plan = make_plan(random, Style::Mixed, room);
    const Regions regions = plan.at(device.address());
    bool all_asked = false;
    for (int64_t nth = 1; !all_asked; ++nth) {
        CHECK(nth < 2000);
        Engine engine;
        const Buffer buffer(engine, Kind::Pageable, plan.buffer_bytes);
        asked = 0;
        refused = nth;
        for (const Way way : {Way::Save, Way::Load}) {
            const kvf_completion completion = finish(start(engine, way, regions, buffer));
            CHECK(completion.status == KVF_OK || completion.status == KVF_ERR_OUT_OF_MEMORY);
        }
        all_asked = asked < nth;
        refused = 0;
        succeed(start(engine, Way::Save, regions, buffer));
        succeed(start(engine, Way::Load, regions, buffer));
    }
    return 0;
}
