// Destroying an engine under load: what is in flight ends as it would, or soon where all was
// cancelled; what comes later is refused.
#include <atomic>

#include "cuda.hpp"

namespace {

constexpr uint64_t kRoom = 2 * MiB;
constexpr size_t kJobs = 24;

void destroy_under_load(Random &random, bool cancel) {
    const Plan plan = make_plan(random, Style::Mixed, kRoom, 500);
    Bytes memory = random_bytes(random, kRoom), expected(plan.buffer_bytes);
    const DeviceMemory device(memory);
    model(plan, Way::Save, memory, expected);
    std::vector<Bytes> buffers(kJobs, Bytes(plan.buffer_bytes));
    const kvf_queue queue = make_queue();
    Engine engine;
    const kvf_engine handle = engine; // for the other thread

    std::atomic<size_t> submitted{0};
    std::thread submitter([&] {
        const Regions regions = plan.at(device.address());
        kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
        options.queue = queue;
        int32_t status = KVF_OK;
        while (status == KVF_OK && submitted < kJobs) {
            options.priority = submitted % 2;
            options.user_data = submitted;
            status =
                kvf_regions_save(handle, regions.data(), regions.size(), buffers[submitted].data(),
                                 plan.buffer_bytes, &options, nullptr);
            if (status == KVF_OK) ++submitted;
        }
        while (status == KVF_OK) {
            status = kvf_regions_save(handle, nullptr, 0, nullptr, 0, nullptr, nullptr);
        }
        CHECK(status == KVF_ERR_CLOSED || status == KVF_ERR_INVALID_HANDLE);
    });
    while (submitted < 4) sleep_ms(1);
    if (cancel) CHECK_OK(kvf_engine_cancel(engine));
    engine.destroy();
    submitter.join();

    kvf_completion completion;
    for (size_t i = 0; i < submitted; ++i) { // all have ended
        CHECK(kvf_queue_take(queue, &completion, sizeof completion, 1, 0) == 1);
        CHECK(completion.status == KVF_OK || (cancel && completion.status == KVF_ERR_CANCELLED));
        CHECK(completion.status != KVF_OK || buffers[completion.user_data] == expected);
    }
    CHECK(kvf_queue_take(queue, &completion, sizeof completion, 1, 0) == 0);
    CHECK_OK(kvf_queue_destroy(queue));
}

} // namespace

int main() {
    Random random(8);
    const Context context;
    const Holdings holdings;
    for (int i = 0; i < 4; ++i) destroy_under_load(random, i % 2 == 1);
    holdings.check_same();
    return 0;
}
