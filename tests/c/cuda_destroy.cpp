// Destroying an engine under load: what is in flight ends as it would, or soon where all was cancelled; what
// comes later is refused.
#include <atomic>

#include "cuda.hpp"

namespace {

constexpr uint64_t kRoom = 3 * MiB;

void destroy_under_load(Random &random, bool cancel) {
    const Plan plan = make_plan(random, Style::Mixed, kRoom);
    Bytes memory = random_bytes(random, kRoom), expected(plan.buffer_bytes, 0);
    const DeviceMemory device(memory);
    model(plan, Way::Save, memory, expected);
    const kvf_queue queue = make_queue();
    Engine engine;
    const kvf_engine handle = engine; // for the other thread

    std::atomic<uint64_t> submitted{0};
    std::thread submitter([&] {
        Bytes buffer(plan.buffer_bytes); // all jobs write the same into it
        kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
        options.queue = queue;
        const Regions regions = plan.at(device.address());
        int32_t status = KVF_OK;
        for (uint32_t i = 0; status == KVF_OK; ++i) {
            options.priority = i % 2;
            status = kvf_regions_save(handle, regions.data(), regions.size(), buffer.data(),
                                      buffer.size(), &options, nullptr);
            if (status == KVF_OK) ++submitted;
            while (submitted > 8 && driver().simulated() && submitted % 4 == 0) {
                kvf_completion completion;
                if (kvf_queue_take(queue, &completion, sizeof completion, 1, 0) == 0) break;
                CHECK(completion.status == KVF_OK || completion.status == KVF_ERR_CANCELLED);
                --submitted;
            }
        }
        CHECK(status == KVF_ERR_CLOSED || status == KVF_ERR_INVALID_HANDLE);
        kvf_completion completion;
        for (; submitted > 0; --submitted) {
            CHECK(kvf_queue_take(queue, &completion, sizeof completion, 1, 60 * SECONDS) == 1);
            CHECK(completion.status == KVF_OK || completion.status == KVF_ERR_CANCELLED);
            CHECK(cancel || completion.status == KVF_OK);
        }
        CHECK(cancel || buffer == expected);
    });
    while (submitted < 4) sleep_ms(1);
    if (cancel) CHECK_OK(kvf_engine_cancel(engine));
    engine.destroy();
    submitter.join();
    kvf_completion none;
    CHECK(kvf_queue_take(queue, &none, sizeof none, 1, 0) == 0);
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
