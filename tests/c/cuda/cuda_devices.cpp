// One job moves the memory of several devices, and of the host.
#include "cuda.hpp"

int main() {
    const int count = need_several_devices(3);
    Random random(3);
    const uint64_t room = 2 * MiB;
    std::vector<std::unique_ptr<Context>> contexts;
    for (int device = 0; device < count; ++device) {
        contexts.push_back(std::make_unique<Context>(device));
    }
    const Holdings holdings;
    Engine engine;
    {
        std::vector<std::unique_ptr<DeviceMemory>> devices;
        std::vector<Bytes> memories;
        std::vector<uint64_t> addresses;
        for (int device = 0; device <= count; ++device) {
            memories.push_back(random_bytes(random, room));
            if (device == count) break; // the host
            contexts[static_cast<size_t>(device)]->adopt();
            devices.push_back(std::make_unique<DeviceMemory>(memories.back()));
            addresses.push_back(devices.back()->address());
        }
        Bytes host = memories.back();
        addresses.push_back(reinterpret_cast<uint64_t>(host.data()));

        for (const Kind kind : kKinds) {
            // A plan over the memories one after another, dealt out in a random order.
            std::vector<Plan> plans;
            Regions regions;
            uint64_t buffer_bytes = 0;
            for (const uint64_t address : addresses) {
                plans.push_back(make_plan(random, Style::Mixed, room, 300));
                for (kvf_region &region : plans.back().regions) region.offset += buffer_bytes;
                buffer_bytes += plans.back().buffer_bytes;
                for (const kvf_region &region : plans.back().at(address)) regions.push_back(region);
            }
            std::shuffle(regions.begin(), regions.end(), random);
            const Buffer buffer(engine, kind, buffer_bytes);

            Bytes expected(buffer_bytes, 0xAA);
            buffer.fill(0xAA);
            for (size_t i = 0; i < plans.size(); ++i) {
                model(plans[i], Way::Save, memories[i], expected);
            }
            succeed(start(engine, Way::Save, regions, buffer));
            CHECK(buffer.holds(expected));

            expected = random_bytes(random, buffer_bytes);
            buffer.fill(expected);
            for (size_t i = 0; i < plans.size(); ++i) {
                model(plans[i], Way::Load, memories[i], expected);
            }
            succeed(start(engine, Way::Load, regions, buffer, KVF_PRIORITY_BACKGROUND));
            for (size_t i = 0; i < devices.size(); ++i) CHECK(devices[i]->read() == memories[i]);
            CHECK(host == memories.back());
        }
    }
    engine.destroy();
    holdings.check_same();
    return 0;
}
