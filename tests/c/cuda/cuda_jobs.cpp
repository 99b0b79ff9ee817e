// Many jobs at once, saves and loads of both priorities into buffers of every kind, submitted by
// several threads: each moves its own bytes, and each is told of once.
#include "cuda.hpp"

namespace {

constexpr uint64_t kRoom = 2 * MiB;
constexpr size_t kJobs = 24;

struct Transfer {
    Way way;
    Plan plan;
    Bytes memory, expected; // what device and buffer must hold in the end
    DeviceMemory device;
    Buffer buffer;
    kvf_job job = 0;

    Transfer(Random &random, kvf_engine engine, size_t i)
        : way(i % 2 ? Way::Load : Way::Save), plan(make_plan(random, kStyles[i % 7], kRoom, 800)),
          memory(random_bytes(random, kRoom)), expected(random_bytes(random, plan.buffer_bytes)),
          device(memory), buffer(engine, kKinds[i % 4], plan.buffer_bytes) {
        buffer.fill(expected);
        model(plan, way, memory, expected);
    }
};

} // namespace

int main() {
    Random random(2);
    const Context context;
    const Holdings holdings;
    Engine engine;
    const kvf_queue queue = make_queue();
    {
        std::vector<std::unique_ptr<Transfer>> transfers;
        for (size_t i = 0; i < kJobs; ++i) {
            transfers.push_back(std::make_unique<Transfer>(random, engine, i));
        }
        std::vector<std::thread> submitters;
        for (size_t first = 0; first < 3; ++first) {
            submitters.emplace_back([&, first] {
                for (size_t i = first; i < kJobs; i += 3) {
                    Transfer &t = *transfers[i];
                    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
                    options.queue = queue;
                    options.user_data = i;
                    options.priority = i / 2 % 2;
                    t.job = start(engine, t.way, t.plan.at(t.device.address()), t.buffer, options);
                }
            });
        }
        for (std::thread &submitter : submitters) submitter.join();

        std::vector<bool> told(kJobs);
        for (size_t i = 0; i < kJobs; ++i) {
            kvf_completion completion;
            CHECK(kvf_queue_take(queue, &completion, sizeof completion, 1, 60 * SECONDS) == 1);
            CHECK_OK(completion.status);
            CHECK(!told[completion.user_data]);
            told[completion.user_data] = true;
            const Transfer &t = *transfers[completion.user_data];
            CHECK(completion.job == t.job);
            CHECK(t.buffer.holds(t.expected));
            CHECK(t.device.read() == t.memory);
            CHECK_OK(kvf_job_release(t.job));
        }
        kvf_completion none;
        CHECK(kvf_queue_take(queue, &none, sizeof none, 1, 0) == 0);
    }
    CHECK_OK(kvf_queue_destroy(queue));
    engine.destroy();
    holdings.check_same();
    return 0;
}
