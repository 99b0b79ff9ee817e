// A device that is lost in flight: every job on it ends with KVF_ERR_DEVICE_LOST, the engine says
// that it is broken and takes no more of it, other devices go on, and a new engine works where the
// driver allows it.
#include "cuda.hpp"

namespace {

constexpr uint64_t kRoom = 3 * MiB;

void lose(Random &random, const char *held, CUresult error) {
    const Driver &d = driver();
    const Context other_context(1);
    const DeviceMemory other(random_bytes(random, kRoom));
    const Holdings holdings;
    Engine engine;
    {
        const Buffer last(engine, Kind::Pool, kRoom);
        std::vector<std::unique_ptr<Buffer>> buffers;
        std::vector<kvf_job> jobs;
        uint64_t address = 0;
        unsigned lost = 0;
        {
            const Context context(0);
            std::vector<std::unique_ptr<DeviceMemory>> memories;
            d.hold(held, 1, 1);
            for (unsigned i = 0; i < 16; ++i) {
                memories.push_back(std::make_unique<DeviceMemory>(random_bytes(random, kRoom)));
                address = memories.back()->address();
                const Plan plan = make_plan(random, kStyles[i % 7], kRoom);
                const Kind kind = i / 2 % 2 ? Kind::Pool : Kind::Pageable;
                buffers.push_back(std::make_unique<Buffer>(engine, kind, plan.buffer_bytes));
                jobs.push_back(start(engine, i % 2 ? Way::Save : Way::Load, plan.at(address),
                                     *buffers.back(), i / 4 % 2));
            }
            CHECK(d.wait_held(2, 20'000));
            CHECK(d.lose_device(0, error, 0) == 0);
            for (const kvf_job job : jobs) {
                const kvf_completion completion = finish(job);
                // Those that need no kernel may have been done before.
                if (completion.status == KVF_OK && strcmp(held, "kernel") == 0) continue;
                CHECK(completion.status == KVF_ERR_DEVICE_LOST && completion.detail[0]);
                ++lost;
            }
            CHECK(lost >= 2);
            d.release();
            CHECK(engine.describes("\"broken\": true"));

            const kvf_region region = {address, kRoom, 1, 0, 0, 0};
            for (const bool save : {true, false}) {
                kvf_job job = 0;
                const int32_t status =
                    save ? kvf_regions_save(engine, &region, 1, last.data(), kRoom, nullptr, &job)
                         : kvf_regions_load(engine, &region, 1, last.data(), kRoom, nullptr, &job);
                CHECK((status == KVF_OK ? finish(job).status : status) == KVF_ERR_DEVICE_LOST);
            }
        }
        const Regions others = {{other.address(), kRoom, 1, 0, 0, 0}};
        const Buffer pageable(engine, Kind::Pageable, kRoom);
        succeed(start(engine, Way::Save, others, pageable));
        CHECK(pageable.holds(other.read()));
    }
    engine.destroy();
    holdings.check_same();

    // The broken context is gone with its last user; the next one works.
    Engine next;
    const Context context(0);
    const DeviceMemory device(random_bytes(random, kRoom));
    const Buffer buffer(next, Kind::Pool, kRoom);
    succeed(start(next, Way::Save, {{device.address(), kRoom, 1, 0, 0, 0}}, buffer));
    CHECK(buffer.holds(device.read()));
}

} // namespace

int main() {
    need_simulation(2);
    Random random(14);
    lose(random, "copy", CUDA_ERROR_ECC_UNCORRECTABLE);
    driver().reset();
    lose(random, "kernel", CUDA_ERROR_LAUNCH_FAILED);
    driver().reset();
    lose(random, "copy", CUDA_ERROR_UNKNOWN);
    return 0;
}
