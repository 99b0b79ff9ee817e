// Where pinned or device memory is short, jobs go on with what there is; and while a lane takes
// memory, nobody who submits or cancels waits for it.
#include "cuda.hpp"

namespace {

constexpr uint64_t kRoom = 24 * MiB;

// Cells that are gathered, and runs that are not.
void move_both_ways(Engine &engine, Random &random, const DeviceMemory &device) {
    for (const Style style : {Style::CellsAtRandom, Style::Long}) {
        const Plan plan = make_plan(random, style, kRoom, 100'000);
        const Buffer buffer(engine, Kind::Pageable, plan.buffer_bytes);
        for (const uint32_t priority : {KVF_PRIORITY_URGENT, KVF_PRIORITY_BACKGROUND}) {
            Bytes memory = random_bytes(random, kRoom), expected(plan.buffer_bytes);
            device.write(memory);
            model(plan, Way::Save, memory, expected);
            succeed(start(engine, Way::Save, plan.at(device.address()), buffer, priority));
            for (const kvf_region &region : plan.regions) {
                CHECK(std::equal(&expected[region.offset], &expected[region.offset] + region.width,
                                 buffer.data() + region.offset));
            }
            const Bytes other = random_bytes(random, plan.buffer_bytes);
            buffer.fill(other);
            expected = other;
            model(plan, Way::Load, memory, expected);
            succeed(start(engine, Way::Load, plan.at(device.address()), buffer, priority));
            CHECK(device.read() == memory);
        }
    }
}

// With room for some bounce buffers and tables, for smaller ones, for one of each direction.
void go_on_with_little_pinned_memory(Random &random, const DeviceMemory &device) {
    Driver &d = driver();
    for (const uint64_t room : {20 * MiB, 7 * MiB, 2 * MiB + 600 * KiB, 2 * MiB}) {
        d.reset();
        Engine engine;
        d.set("pinned_limit", d.count("pinned_bytes") + room);
        // One direction may have taken it all: it must leave something to the other in this test.
        const uint64_t before = d.count("pinned_bytes");
        const DeviceMemory other(MiB);
        const Buffer first(engine, Kind::Pageable, MiB);
        d.set("pinned_limit", before + MiB);
        succeed(start(engine, Way::Save, {{other.address(), MiB, 1, 0, 0, 0}}, first));
        d.set("pinned_limit", before + 2 * MiB);
        succeed(start(engine, Way::Load, {{other.address(), MiB, 1, 0, 0, 0}}, first));
        d.set("pinned_limit", before + room);
        move_both_ways(engine, random, device);
        // What could not be had is not asked for at every turn.
        CHECK(d.calls("cuMemHostAlloc") < 100 && d.calls("cuMemAlloc") < 100);
    }
}

// Staging for which no table can be had is not taken and released again and again while other
// staging is in use.
void remember_what_is_scarce(Random &random, const DeviceMemory &device) {
    Driver &d = driver();
    d.reset();
    d.set("latency_us", 2000);
    const Plan plan = make_plan(random, Style::CellsAtRandom, kRoom, 100'000);
    Engine engine;
    const Buffer buffer(engine, Kind::Pool, plan.buffer_bytes);
    d.set("pinned_limit", d.count("pinned_bytes") + 600 * KiB);
    for (int i = 0; i < 3; ++i) {
        succeed(start(engine, Way::Save, plan.at(device.address()), buffer));
    }
    CHECK(d.count("kernels") > 1 && d.calls("cuMemAlloc") < 20);
}

// The second submission, and its cancelling, come back while the lane takes memory for the first.
void let_others_submit_meanwhile(const DeviceMemory &device) {
    Driver &d = driver();
    d.reset();
    Engine engine;
    const Buffer buffer(engine, Kind::Pageable, kRoom), pinned(engine, Kind::Foreign, kRoom);
    const Regions regions = {{device.address(), kRoom, 1, 0, 0, 0}};
    d.set("allocation_us", 300'000);
    const uint64_t before = d.calls("cuMemHostAlloc");
    const kvf_job first = start(engine, Way::Save, regions, buffer);
    while (d.calls("cuMemHostAlloc") == before) sleep_ms(1);
    const int64_t begin = clock_ns();
    const kvf_job second = start(engine, Way::Save, regions, pinned);
    CHECK_OK(kvf_job_cancel(second));
    CHECK(clock_ns() - begin < 150 * MILLISECONDS);
    CHECK_OK(kvf_job_cancel(first));
    finish(first);
    finish(second);
}

} // namespace

int main() {
    need_simulation();
    Random random(21);
    const Context context;
    const Holdings holdings;
    {
        const DeviceMemory device(kRoom);
        go_on_with_little_pinned_memory(random, device);
        remember_what_is_scarce(random, device);
        let_others_submit_meanwhile(device);
    }
    holdings.check_same();
    return 0;
}
