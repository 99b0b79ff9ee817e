// Within a priority, a pump moves the job that came first: at most as many are begun and not
// finished as it has slots.
#include "cuda.hpp"

namespace {

constexpr size_t kJobs = 24, kSlots = 8;
// More pieces than a slot takes.
constexpr uint64_t kRun = 64 * KiB, kRuns = 100;

void in_order(kvf_engine engine, Way way, uint32_t priority) {
    const DeviceMemory memory(2 * kRun * kRuns);
    Regions regions;
    for (uint64_t i = 0; i < kRuns; ++i) {
        regions.push_back({memory.address() + 2 * i * kRun, kRun, 1, 0, i * kRun, 0});
    }
    std::vector<std::unique_ptr<Buffer>> buffers;
    std::vector<kvf_job> jobs;
    driver().hold("copy", 1, 1);
    for (size_t i = 0; i < kJobs; ++i) {
        buffers.push_back(std::make_unique<Buffer>(engine, Kind::Pool, kRun * kRuns));
        jobs.push_back(start(engine, way, regions, *buffers.back(), priority));
    }
    CHECK(driver().wait_held(1, 20'000));
    driver().release();
    std::vector<kvf_completion> completions;
    for (const kvf_job job : jobs) completions.push_back(succeed(job));
    for (size_t i = 0; i < kJobs; ++i) {
        const auto unfinished = [&](const kvf_completion &before) {
            return before.finished_ns > completions[i].started_ns;
        };
        const auto end = completions.begin() + static_cast<std::ptrdiff_t>(i);
        CHECK(std::count_if(completions.begin(), end, unfinished) < std::ptrdiff_t{kSlots});
    }
}

} // namespace

int main() {
    need_simulation();
    const Context context;
    const Holdings holdings;
    Engine engine;
    for (const Way way : {Way::Save, Way::Load}) {
        for (const uint32_t priority : {KVF_PRIORITY_BACKGROUND, KVF_PRIORITY_URGENT}) {
            in_order(engine, way, priority);
        }
    }
    engine.destroy();
    holdings.check_same();
    return 0;
}
