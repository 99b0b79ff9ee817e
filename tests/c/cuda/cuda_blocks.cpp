// Jobs of many blocks: small regions with libllama's few bytes between them are gathered on the
// device and copied as one, gaps included. A gap survives a save byte for byte; it is never written
// where it is not the job's.
#include <numeric>

#include "blocks.hpp"
#include "inside.hpp"

namespace {

constexpr Cells kCells[] = {Cells::Contiguous, Cells::InTurn, Cells::Transposed, Cells::AtRandom,
                            Cells::InTurnInPart};

// How a job's blocks lie in host memory: in any order, with little between them.
struct Places {
    std::vector<uint64_t> distances; // of the blocks' buffers from the job's
    uint64_t bytes = 0;

    Places(Random &random, const Blocks &blocks) : distances(blocks.count) {
        std::vector<uint64_t> order(blocks.count);
        std::iota(order.begin(), order.end(), 0);
        if (random() % 2) std::shuffle(order.begin(), order.end(), random);
        for (const uint64_t block : order) {
            distances[block] = bytes;
            bytes += blocks.buffer_bytes() + 4 * between(random, 0, 40);
        }
    }
};

void model(const Blocks &blocks, const Places &places, Way way, Bytes &memory, Bytes &buffer) {
    for (uint64_t block = 0; block < blocks.count; ++block) {
        blocks.for_each_fragment(
            block, 0, [] {},
            [&](uint64_t address, uint64_t offset, uint64_t bytes) {
                unsigned char *m = &memory[address];
                unsigned char *b = &buffer[places.distances[block] + offset];
                way == Way::Save ? std::copy_n(m, bytes, b) : std::copy_n(b, bytes, m);
            });
    }
}

struct Transfer {
    Way way;
    uint32_t priority = KVF_PRIORITY_URGENT;
    bool owns_gaps = true;
    bool in_parts = false; // recorded while it moves
};

std::shared_ptr<kvf::Job> begin(kvf::Engine &engine, const Transfer &transfer, const Blocks &blocks,
                                const Places &places, uint64_t address, unsigned char *buffer) {
    const auto layout = [&](uint64_t block) {
        return blocks.layout(block, address, places.distances[block], transfer.owns_gaps);
    };
    kvf::Submission submission = make_submission(transfer.way, buffer, places.bytes);
    const kvf_submit_options options = options_of(transfer.priority);
    if (!transfer.in_parts) {
        kvf::Recorded recorded;
        for (uint64_t i = 0; i < blocks.count; ++i) recorded.layouts.emplace_back(1, layout(i));
        return kvf::submit_job(engine, std::move(submission), std::move(recorded), options,
                               nullptr);
    }
    kvf::OpenJob open(engine, std::move(submission), options, false);
    for (uint64_t i = 0; i < blocks.count; ++i) open.add(1, layout(i));
    open.commit({}, nullptr);
    return open.job();
}

// Device memory and a buffer with random content, and what a transfer makes of them.
class Test {
public:
    Test(Random &random, kvf::Engine &engine, const Blocks &blocks, bool pinned, Way way)
        : engine_(engine), blocks_(blocks), places_(random, blocks),
          memory_(random_bytes(random, blocks.device_bytes())),
          content_(random_bytes(random, places_.bytes)), device_(memory_),
          pageable_(pinned ? 0 : places_.bytes),
          buffer_(pinned ? static_cast<unsigned char *>(engine.pool().alloc(places_.bytes))
                         : pageable_.data()),
          pinned_(pinned) {
        std::copy(content_.begin(), content_.end(), buffer_);
        memory_after_ = memory_;
        content_after_ = content_;
        model(blocks_, places_, way, memory_after_, content_after_);
    }
    ~Test() {
        if (pinned_) kvf_buffer_free(buffer_);
    }

    std::shared_ptr<kvf::Job> begin(const Transfer &transfer) {
        return ::begin(engine_, transfer, blocks_, places_, device_.address(), buffer_);
    }
    void check_moved() const {
        CHECK(device_.read() == memory_after_);
        CHECK(std::equal(content_after_.begin(), content_after_.end(), buffer_));
    }
    // Each byte is as it was, or as it would have become.
    void check_moved_in_part() const {
        const Bytes memory = device_.read();
        for (uint64_t i = 0; i < memory.size(); ++i) {
            CHECK(memory[i] == memory_[i] || memory[i] == memory_after_[i]);
        }
        for (uint64_t i = 0; i < content_.size(); ++i) {
            CHECK(buffer_[i] == content_[i] || buffer_[i] == content_after_[i]);
        }
    }
    // Somebody else writes all that is not of a tensor.
    void change_gaps() {
        Bytes is_moved(places_.bytes), memory(blocks_.device_bytes(), 1);
        model(blocks_, places_, Way::Save, memory, is_moved);
        for (uint64_t i = 0; i < is_moved.size(); ++i) {
            if (!is_moved[i]) buffer_[i] = content_after_[i] = static_cast<unsigned char>(i);
        }
    }

private:
    kvf::Engine &engine_;
    const Blocks &blocks_;
    const Places places_;
    const Bytes memory_, content_;
    const DeviceMemory device_;
    Bytes memory_after_, content_after_, pageable_;
    unsigned char *const buffer_;
    const bool pinned_;
};

uint64_t calls(const char *what) { return driver().simulated() ? driver().calls(what) : 0; }
uint64_t counted(const char *what) { return driver().simulated() ? driver().count(what) : 0; }

void all_ways(Random &random, kvf::Engine &engine, const Blocks &blocks) {
    bool in_parts = random() % 2;
    for (const bool pinned : {true, false}) {
        for (const Way way : {Way::Save, Way::Load}) {
            for (const uint32_t priority : {KVF_PRIORITY_URGENT, KVF_PRIORITY_BACKGROUND}) {
                for (const bool owns_gaps : {true, false}) {
                    in_parts = !in_parts;
                    Test test(random, engine, blocks, pinned, way);
                    const uint64_t saved = counted("bytes_save");
                    succeed(test.begin({way, priority, owns_gaps, in_parts}));
                    test.check_moved();
                    if (way == Way::Load || !driver().simulated()) continue;
                    const uint64_t most = blocks.bytes() + (owns_gaps ? blocks.gap_bytes() : 0);
                    CHECK(counted("bytes_save") - saved <= most);
                }
            }
        }
    }
}

// A copy moves up to 16 MiB of a block.
void few_copies(Random &random, kvf::Engine &engine) {
    if (!driver().simulated()) return;
    for (const Cells cells : {Cells::Contiguous, Cells::InTurn, Cells::Transposed}) {
        const Blocks blocks{cells, 3, 8, 256, 2048};
        for (const Way way : {Way::Save, Way::Load}) {
            Test test(random, engine, blocks, true, way);
            const char *const copy = way == Way::Save ? "cuMemcpyDtoHAsync" : "cuMemcpyHtoDAsync";
            const uint64_t before = calls(copy) + calls("cuMemcpy2DAsync");
            succeed(test.begin({way}));
            // 12 MiB fit one slot. K's long rows and V's short ones have slots of their own, and
            // each load of long rows has a table.
            const uint64_t most = cells == Cells::Transposed ? 3 * blocks.count : blocks.count + 1;
            CHECK(calls(copy) + calls("cuMemcpy2DAsync") - before <= most);
            test.check_moved();
        }
    }
}

// The submitter's own bytes, and somebody else's, change while the job is in flight.
void foreign_gaps_are_not_written(Random &random, kvf::Engine &engine) {
    if (!driver().simulated()) return;
    for (const Cells cells : kCells) {
        const Blocks blocks{cells, 2, 4, 256, 512};
        for (const uint32_t priority : {KVF_PRIORITY_URGENT, KVF_PRIORITY_BACKGROUND}) {
            Test test(random, engine, blocks, true, Way::Save);
            driver().hold("copy", 1, 1);
            const auto job = test.begin({Way::Save, priority, false});
            CHECK(driver().wait_held(1, 10'000) == 1);
            test.change_gaps();
            driver().release();
            succeed(job);
            test.check_moved();
        }
    }
}

void cancelled(Random &random, kvf::Engine &engine) {
    if (!driver().simulated()) return;
    for (const Cells cells : {Cells::Contiguous, Cells::Transposed, Cells::AtRandom}) {
        const Blocks blocks{cells, 3, 8, 256, 2048};
        for (const Way way : {Way::Save, Way::Load}) {
            for (const uint64_t nth : {1, 3}) {
                Test test(random, engine, blocks, true, way);
                driver().hold("copy", nth, 1);
                const auto job = test.begin({way, KVF_PRIORITY_BACKGROUND});
                CHECK(driver().wait_held(1, 10'000) == 1);
                job->cancel();
                driver().release();
                const int32_t status = finish(job).status;
                CHECK(status == KVF_ERR_CANCELLED || status == KVF_OK);
                test.check_moved_in_part();
            }
        }
    }
}

void failed(Random &random, kvf::Engine &engine) {
    if (!driver().simulated()) return;
    for (const char *call : {"cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuLaunchKernel"}) {
        for (const uint64_t nth : {1, 2, 3}) {
            const Blocks blocks{Cells::Contiguous, 4, 8, 256, 2048};
            Test test(random, engine, blocks, true, Way::Save);
            driver().fail(call, nth, CUDA_ERROR_INVALID_VALUE, 0);
            CHECK(finish(test.begin({Way::Save, KVF_PRIORITY_BACKGROUND})).status != KVF_OK);
            test.check_moved_in_part();
            succeed(test.begin({Way::Save}));
            test.check_moved();
        }
    }
}

} // namespace

int main() {
    Random random(5);
    const Context context;
    const Holdings holdings;
    for (const uint64_t staging_bytes : {uint64_t{0}, 2 * MiB}) {
        kvf_engine_options options = KVF_ENGINE_OPTIONS_INIT;
        options.devices = KVF_DEVICES_CUDA;
        options.staging_bytes = staging_bytes;
        kvf::Engine engine(options);
        for (const Cells cells : kCells) {
            all_ways(random, engine, {cells, 3, 6, 256, 512});
            all_ways(random, engine, {cells, 4, 3, 32, 100, 36, 256}); // a gap that is just bridged
            all_ways(random, engine, {cells, 2, 4, 32, 100, 36, 260}); // and one that is not
            all_ways(random, engine, {cells, 5, 4, 1, 2, 8});
        }
        all_ways(random, engine, {Cells::Contiguous, 2, 3, 256, 2048});
        if (staging_bytes == 0) few_copies(random, engine);
        foreign_gaps_are_not_written(random, engine);
        cancelled(random, engine);
        failed(random, engine);
        engine.close();
    }
    holdings.check_same();
    return 0;
}
