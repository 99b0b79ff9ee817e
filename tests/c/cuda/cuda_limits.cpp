// Device memory stays within staging_bytes for a direction, pinned memory of the library's own
// within 64 MiB for both, and background jobs within two copies in the device's queue; urgent ones
// have more there.
#include "cuda.hpp"

namespace {

constexpr uint64_t kRoom = 24 * MiB;
constexpr uint64_t kTooLittle = 700 * KiB; // to be of use

void move_both_ways(kvf_engine engine, const Plan &plan, Kind kind, uint32_t priority) {
    const DeviceMemory device(kRoom), other(kRoom);
    const Buffer buffer(engine, kind, plan.buffer_bytes),
        other_buffer(engine, kind, buffer.bytes());
    const kvf_job save = start(engine, Way::Save, plan.at(device.address()), buffer, priority);
    const kvf_job load = start(engine, Way::Load, plan.at(other.address()), other_buffer, priority);
    succeed(save);
    succeed(load);
}

} // namespace

int main() {
    need_simulation();
    Driver &d = driver();
    Random random(9);
    const Context context;
    const Holdings holdings;
    for (const uint64_t staging : {uint64_t{0}, GiB, 10 * MiB + 5, 5 * MiB, 2 * MiB, kTooLittle}) {
        d.reset();
        const uint64_t before = d.count("device_bytes"), pinned = d.count("pinned_bytes");
        Engine engine(staging);
        for (const uint32_t priority : {KVF_PRIORITY_BACKGROUND, KVF_PRIORITY_URGENT}) {
            for (const Style style : {Style::CellsAtRandom, Style::Narrow, Style::Mixed}) {
                const Plan plan = make_plan(random, style, kRoom, 100'000);
                move_both_ways(engine, plan, Kind::Pageable, priority);
            }
        }
        CHECK(d.count("peak_device_bytes") - before <=
              2 * kRoom + 2 * (staging ? staging : 32 * MiB));
        CHECK(d.count("peak_device_bytes") - before <= 2 * kRoom + 2 * 68 * MiB); // of any use
        CHECK(d.count("peak_pinned_bytes") - pinned <= 64 * MiB);
        const uint64_t now = d.count("pinned_bytes") - pinned;
        CHECK(engine.describes(("\"pinned_bytes\": " + std::to_string(now) + ",").c_str()));
        CHECK((d.count("kernels") > 0) == (staging != kTooLittle));
    }

    d.reset();
    d.set("latency_us", 300);
    Engine engine;
    const Plan run = {{{0, kRoom, 1, 0, 0, 0}}, kRoom};
    for (const Kind kind : {Kind::Pool, Kind::Pageable}) {
        move_both_ways(engine, run, kind, KVF_PRIORITY_BACKGROUND);
    }
    CHECK(d.peak_queued(0, KVFSIM_SAVE) == 2 && d.peak_queued(0, KVFSIM_LOAD) == 2);

    // What is staged for a pageable buffer takes no more staging than its bounce buffers have room
    // for.
    d.reset();
    d.set("latency_us", 3000);
    {
        constexpr uint64_t kCell = 2 * KiB;
        Plan cells;
        for (uint64_t at = 0, gap = 2; at + kCell <= 3 * kRoom; at += gap * kCell, gap = 5 - gap) {
            cells.regions.push_back({at, kCell, 1, 0, cells.buffer_bytes, 0});
            cells.buffer_bytes += kCell;
        }
        const DeviceMemory device(3 * kRoom);
        const Buffer buffer(engine, Kind::Pageable, cells.buffer_bytes);
        succeed(start(engine, Way::Save, cells.at(device.address()), buffer));
    }
    CHECK(d.peak_queued(0, KVFSIM_SAVE) >= 5);
    engine.destroy();
    holdings.check_same();
    return 0;
}
