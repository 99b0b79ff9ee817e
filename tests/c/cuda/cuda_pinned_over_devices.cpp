// What an engine pins for its own use is bounded over all devices, and not only for each. A device
// that finds nothing left goes on with little; a device that works alone has all that it can use.
#include "cuda.hpp"

namespace {

constexpr int kDevices = 4;
constexpr uint64_t kBytes = 40 * MiB;
// As lane_memory.h has it: what two devices use at most, and the least that each device goes on
// with.
constexpr uint64_t kMost = 114 * MiB + kDevices * 5 * MiB;
constexpr uint64_t kBounces = 7 * 4 * MiB; // of one direction at most

// A save and a load between one device and pageable memory.
struct Transfers {
    const Context context;
    const Bytes saved, loaded;
    const DeviceMemory from, to;
    const Buffer destination, source;
    kvf_job save = 0, load = 0;

    Transfers(kvf_engine engine, int device, Random &random)
        : context(device), saved(random_bytes(random, kBytes)),
          loaded(random_bytes(random, kBytes)), from(saved), to(kBytes),
          destination(engine, Kind::Pageable, kBytes), source(engine, Kind::Pageable, kBytes) {
        source.fill(loaded);
    }
    void begin(kvf_engine engine) {
        save = start(engine, Way::Save, {{from.address(), kBytes, 1, 0, 0, 0}}, destination);
        load = start(engine, Way::Load, {{to.address(), kBytes, 1, 0, 0, 0}}, source);
    }
    void end() {
        succeed(save);
        succeed(load);
        CHECK(destination.holds(saved) && to.read() == loaded);
    }
};

using TransfersOfDevices = std::vector<std::unique_ptr<Transfers>>;

} // namespace

int main() {
    need_simulation(kDevices);
    Driver &d = driver();
    Random random(12);
    const Holdings holdings;
    {
        Engine engine;
        TransfersOfDevices devices;
        for (int i = 0; i < kDevices; ++i) {
            devices.push_back(std::make_unique<Transfers>(engine, i, random));
        }
        d.set("latency_us", 5'000); // so that all slots are in use
        const uint64_t pinned = d.count("pinned_bytes");
        for (auto &device : devices) device->begin(engine);
        for (auto &device : devices) device->end();
        CHECK(d.count("peak_pinned_bytes") - pinned <= kMost);

        CHECK_OK(kvf_buffer_trim(engine));
        for (auto &device : devices) {
            device->begin(engine);
            device->end();
            CHECK(d.count("peak_pinned_bytes") - pinned <= kMost);
        }
        CHECK(d.count("pinned_bytes") - pinned > kMost - 2 * kBounces); // the first have taken most

        // Alone again, the last one has what it can use.
        CHECK_OK(kvf_buffer_trim(engine));
        CHECK(d.count("pinned_bytes") == pinned);
        devices.back()->begin(engine);
        devices.back()->end();
        CHECK(d.count("pinned_bytes") - pinned >= kBounces);
        while (!devices.empty()) devices.pop_back();
    }
    holdings.check_same();
    return 0;
}
