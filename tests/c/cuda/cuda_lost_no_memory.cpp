// Where a pump that finds its device lost is refused memory, whenever that is, its jobs still end.
#include "cuda.hpp"
#include "refuse_memory.hpp"

namespace {

constexpr uint64_t kBytes = MiB;

// Two jobs are under way as `lose` is called. False if the pumps asked for less memory than is
// refused.
bool refuse(int64_t nth, void (*lose)()) {
    const Driver &d = driver();
    const Context context;
    const DeviceMemory saved(kBytes), loaded(kBytes);
    Engine engine;
    const Buffer buffer(engine, Kind::Pageable, kBytes), other(engine, Kind::Pageable, kBytes);
    d.hold("copy", 1, 1);
    const kvf_job save = start(engine, Way::Save, {{saved.address(), kBytes, 1, 0, 0, 0}}, buffer);
    const kvf_job load = start(engine, Way::Load, {{loaded.address(), kBytes, 1, 0, 0, 0}}, other);
    CHECK(d.wait_held(2, 20'000));
    asked = 0;
    refused = nth;
    lose();
    for (const kvf_job job : {save, load}) {
        const int32_t status = finish(job).status;
        CHECK(status == KVF_ERR_DEVICE_LOST || status == KVF_ERR_OUT_OF_MEMORY);
    }
    const bool was_asked = asked >= nth;
    refused = 0;
    CHECK(engine.describes("\"broken\": true"));
    d.release(); // or to free the memory would wait for the copies
    return was_asked;
}

void at_every_allocation(void (*lose)()) {
    for (int64_t nth = 1; refuse(nth, lose); ++nth) CHECK(nth < 100);
}

} // namespace

int main() {
    setenv("KVFERRY_STUCK_SECONDS", "1", 1);
    need_simulation();
    at_every_allocation([] { CHECK(driver().lose_device(0, CUDA_ERROR_LAUNCH_FAILED, 0) == 0); });
    at_every_allocation([] {}); // until it is given up
    return 0;
}
