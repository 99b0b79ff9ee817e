// Jobs of all kinds at once, urgent and in the background, recorded before they move or meanwhile,
// of pinned and of pageable buffers, some cancelled, some retracted, with little staging and with
// much, while another thread frees all idle memory: each byte is where it belongs, and nothing
// beside them is touched.
//
//     test_cuda_mixed [seed [rounds]]
#include <atomic>

#include "inside.hpp"

namespace {

constexpr unsigned kClients = 4;

// Tensors that are fragmented alike, with a few bytes of the buffer between them.
struct Tensors {
    Plan one;
    uint64_t count = 1, room = 0; // the latter of one
    std::vector<uint64_t> offsets;
    uint64_t buffer_bytes = 0;

    Regions regions(uint64_t tensor, uint64_t address) const {
        Regions moved = one.at(address + tensor * room);
        for (kvf_region &region : moved) region.offset += offsets[tensor];
        return moved;
    }
    Plan plan() const {
        Plan all;
        for (uint64_t i = 0; i < count; ++i) {
            for (const kvf_region &region : regions(i, 0)) all.regions.push_back(region);
        }
        all.buffer_bytes = buffer_bytes;
        return all;
    }
};

// Rows that are worth a launch of their own, some of them on lines of the host.
Plan make_regular(Random &random) {
    constexpr uint64_t kWidths[] = {100, 256, 768, 1028, 2048, 4096, 4100, 8000};
    Plan plan;
    kvf_region region{};
    region.width = kWidths[between(random, 0, std::size(kWidths) - 1)];
    region.rows = between(random, 400 * KiB, 1500 * KiB) / region.width;
    region.pitch = region.buffer_pitch = region.width;
    region.pitch += between(random, 1, 8) * 256;
    plan.regions.push_back(region);
    plan.buffer_bytes = region.rows * region.width;
    return plan;
}

Tensors make_tensors(Random &random) {
    Tensors tensors;
    const bool is_regular = between(random, 0, 3) == 0;
    tensors.count = between(random, 1, 12);
    if (is_regular) {
        tensors.one = make_regular(random);
    } else {
        const Style style = kStyles[between(random, 0, std::size(kStyles) - 1)];
        tensors.one =
            make_plan(random, style, between(random, 200 * KiB, 10 * MiB / tensors.count));
    }
    const kvf_region &last = tensors.one.regions.back();
    tensors.room = last.address + last.rows * std::max(last.pitch, last.width) + 3000;
    const uint64_t most_gap = between(random, 0, 2) * 300;
    for (uint64_t i = 0; i < tensors.count; ++i) {
        tensors.buffer_bytes += between(random, 0, most_gap);
        tensors.offsets.push_back(tensors.buffer_bytes);
        tensors.buffer_bytes += tensors.one.buffer_bytes;
    }
    return tensors;
}

// What a buffer or a device holds, and what it will when all has moved.
bool is_between(std::span<const unsigned char> now, const Bytes &before, const Bytes &after) {
    for (uint64_t i = 0; i < now.size(); ++i) {
        if (now[i] != before[i] && now[i] != after[i]) return false;
    }
    return true;
}

class Client {
public:
    Client(kvf_engine engine, uint64_t seed)
        : handle_(engine), engine_(kvf::find<kvf::Engine>(engine)), random_(seed) {}

    void move_something() {
        const Tensors tensors = make_tensors(random_);
        const Plan plan = tensors.plan();
        const Way way = chance(2) ? Way::Save : Way::Load;
        const Kind kind = kKinds[between(random_, 0, std::size(kKinds) - 1)];
        options_.priority = chance(2) ? KVF_PRIORITY_URGENT : KVF_PRIORITY_BACKGROUND;
        const Buffer buffer(handle_, kind, tensors.buffer_bytes, between(random_, 0, 600));
        Bytes memory = random_bytes(random_, tensors.count * tensors.room);
        Bytes content = random_bytes(random_, tensors.buffer_bytes);
        const DeviceMemory device(memory);
        buffer.fill(content);
        const Bytes before = way == Way::Save ? content : memory;
        model(plan, way, memory, content);
        const Bytes &after = way == Way::Save ? content : memory;
        const int32_t status = chance(2) ? move_whole(way, plan, device, buffer)
                                         : move_in_parts(way, tensors, device, buffer);
        CHECK(status == KVF_OK || status == KVF_ERR_CANCELLED);
        const Bytes on_device = device.read();
        const std::span<const unsigned char> target =
            way == Way::Save ? std::span<const unsigned char>(buffer.span()) : on_device;
        CHECK(status == KVF_OK ? std::equal(target.begin(), target.end(), after.begin())
                               : is_between(target, before, after));
        CHECK(way == Way::Save ? on_device == memory : buffer.holds(content));
    }

private:
    bool chance(uint64_t in) { return between(random_, 1, in) == 1; }
    void pause() {
        if (chance(2)) return;
        std::this_thread::sleep_for(std::chrono::microseconds(between(random_, 1, 500)));
    }

    int32_t move_whole(Way way, const Plan &plan, const DeviceMemory &device,
                       const Buffer &buffer) {
        const kvf_job job = start(handle_, way, plan.at(device.address()), buffer, options_);
        if (chance(5)) {
            pause();
            CHECK_OK(kvf_job_cancel(job));
        }
        return finish(job).status;
    }

    // With the rest still being recorded.
    int32_t move_in_parts(Way way, const Tensors &tensors, const DeviceMemory &device,
                          const Buffer &buffer) {
        kvf::OpenJob open(*engine_, make_submission(way, buffer.data(), buffer.bytes()), options_,
                          false);
        kvf::LayoutBuilder builder;
        const uint64_t at_once = between(random_, 1, 4);
        const bool owns_gaps = chance(2);
        const auto with_gaps = [owns_gaps](kvf::Layout &&layout) {
            layout.owns_gaps = owns_gaps;
            return std::move(layout);
        };
        for (uint64_t i = 0; i < tensors.count; ++i) {
            for (const kvf_region &region : tensors.regions(i, device.address())) {
                builder.add(region);
            }
            builder.begin_tensor();
            if (i % at_once == 0) open.add(1, with_gaps(builder.take()));
            pause();
            if (chance(20)) open.job()->cancel();
        }
        const std::shared_ptr<kvf::Job> job = open.job();
        if (chance(8)) return KVF_ERR_CANCELLED; // and retracts the job
        open.commit(make_recorded(1, with_gaps(builder.finish())), nullptr);
        return finish(job).status;
    }

    const kvf_engine handle_;
    const std::shared_ptr<kvf::Engine> engine_;
    Random random_;
    kvf_submit_options options_ = KVF_SUBMIT_OPTIONS_INIT;
};

void mix(const Context &context, uint64_t seed, uint64_t rounds, uint64_t staging_bytes) {
    Engine engine(staging_bytes);
    std::atomic<unsigned> at_work{kClients};
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < kClients; ++i) {
        threads.emplace_back([&, i] {
            context.adopt();
            Client client(engine, seed * kClients + i);
            for (uint64_t round = 0; round < rounds; ++round) client.move_something();
            --at_work;
        });
    }
    threads.emplace_back([&] {
        Random random(seed);
        while (at_work) {
            CHECK_OK(kvf_buffer_trim(engine));
            std::this_thread::sleep_for(std::chrono::microseconds(between(random, 0, 3000)));
        }
    });
    for (std::thread &thread : threads) thread.join();
}

} // namespace

int main(int argc, char **argv) {
    const uint64_t seed = argc > 1 ? strtoull(argv[1], nullptr, 10) : 1;
    const uint64_t rounds = argc > 2 ? strtoull(argv[2], nullptr, 10) : 12;
    const Context context;
    const Holdings holdings;
    uint64_t n = seed * 100;
    for (const uint64_t staging_bytes : {2 * MiB, 3 * MiB, 8 * MiB, uint64_t{0}}) {
        mix(context, ++n, rounds, staging_bytes);
    }
    holdings.check_same();
    return 0;
}
