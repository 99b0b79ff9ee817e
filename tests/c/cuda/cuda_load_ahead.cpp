// Loads ahead: the bytes are staged on the device before it is known where they belong, and then
// placed. All of them are placed, whenever the layout comes; none where the job ends otherwise. The
// memory is kept for the next load, or freed.
#include "inside.hpp"

namespace {

// Blocks, long runs and an irregular rest, in tensors, as libllama names them.
struct State {
    std::vector<kvf::Layout> tensors; // from address 0 on
    uint64_t device_bytes = 0, bytes = 0;

    State(Random &random, uint64_t count, uint64_t cells) {
        const uint64_t row = 4 * between(random, 1, 600);
        std::vector<uint64_t> irregular;
        for (uint64_t cell = 0; irregular.size() < cells; cell += 1 + random() % 4)
            irregular.push_back(cell);
        const auto cell_at = [&](uint64_t kind, uint64_t i) {
            if (kind == 0) return i;
            return kind == 1 ? 3 * i : irregular[i];
        };
        kvf::LayoutBuilder builder;
        for (uint64_t tensor = 0; tensor < count; ++tensor) {
            bytes += 12; // libllama's metadata
            builder.begin_tensor();
            const uint64_t kind = random() % 3;
            for (uint64_t i = 0; i < cells; ++i) {
                builder.add(kBase + device_bytes + cell_at(kind, i) * row, bytes, row);
                bytes += row;
            }
            device_bytes += 4 * cells * row;
        }
        layout = builder.finish();
    }
    // An irregular rest of so many short runs, the middle one followed by a long one that is a copy
    // of its own.
    State(uint64_t runs, uint64_t long_run) {
        kvf::LayoutBuilder builder;
        for (uint64_t i = 0, gap = 2; i < runs; ++i, gap = 5 - gap) {
            builder.add(kBase + device_bytes, bytes, 16);
            device_bytes += 16 * gap;
            bytes += 16;
            if (i != runs / 2 || !long_run) continue;
            builder.add(kBase + device_bytes, bytes, long_run);
            device_bytes += long_run + 16;
            bytes += long_run;
        }
        layout = builder.finish();
    }
    kvf::Layout at(uint64_t address) const { return moved(address - kBase); }
    void model(Bytes &memory, const Bytes &buffer) const {
        kvf::Cursor cursor(layout);
        while (!cursor.at_end()) {
            const kvf::Piece piece = cursor.next(UINT64_MAX, UINT64_MAX);
            for (uint64_t i = 0; i < (piece.runs ? piece.count : piece.region.rows); ++i) {
                const kvf::Run run =
                    piece.runs ? piece.run(i)
                               : kvf::Run{piece.region.address + i * piece.region.pitch,
                                          piece.region.offset + i * piece.region.buffer_pitch,
                                          piece.region.width};
                std::memcpy(&memory[run.address - kBase], &buffer[run.offset], run.bytes);
            }
        }
    }

private:
    static constexpr uint64_t kBase = uint64_t{1} << 40;
    kvf::Layout layout;

    kvf::Layout moved(uint64_t distance) const {
        kvf::Layout there = layout;
        for (kvf_region &block : there.regions) block.address += distance;
        for (kvf::Span &span : there.spans) span.address_distance += distance;
        return there;
    }
};

struct Test {
    std::shared_ptr<kvf::Engine> engine;
    kvf::Device &device;
    const State &state;
    DeviceMemory memory;
    uint32_t priority = KVF_PRIORITY_URGENT;

    Test(std::shared_ptr<kvf::Engine> engine, const State &state)
        : engine(engine), device(engine->device(1)), state(state), memory(state.device_bytes) {}

    kvf::Submission submission(const unsigned char *buffer) const {
        return make_submission(Way::Load, const_cast<unsigned char *>(buffer), state.bytes);
    }
    kvf_submit_options options() const { return options_of(priority); }
    kvf::Recorded recorded() const {
        kvf::Recorded recorded = make_recorded(1, state.at(memory.address()));
        recorded.bytes = state.bytes;
        return recorded;
    }
};

// The layout comes at once, while the bytes are under way, or when they are all there.
void load(Test &test, Random &random, const unsigned char *buffer, int64_t wait_ms) {
    Bytes expected = random_bytes(random, test.state.device_bytes);
    test.memory.write(expected);
    test.state.model(expected, Bytes(buffer, buffer + test.state.bytes));
    std::shared_ptr<kvf::Job> job;
    {
        const auto load_ahead = test.device.make_load_ahead({{0, test.state.bytes}});
        CHECK(load_ahead);
        kvf::OpenJob open(*test.engine, test.submission(buffer), test.options(), false);
        job = open.job();
        open.stage(1, load_ahead);
        if (wait_ms) sleep_ms(wait_ms);
        open.commit(test.recorded(), nullptr);
    }
    succeed(job);
    CHECK(test.memory.read() == expected);
}

// No byte of the state belongs to this device after all.
void load_nothing(Test &test, const unsigned char *buffer) {
    kvf::OpenJob open(*test.engine, test.submission(buffer), test.options(), false);
    const auto job = open.job();
    open.stage(1, test.device.make_load_ahead({{0, test.state.bytes}}));
    open.commit({}, nullptr);
    succeed(job);
}

// The job is retracted, or cancelled at any time: nothing moves any more, whatever had begun.
void end_otherwise(Test &test, Random &random, const unsigned char *buffer) {
    for (int i = 0; i < 12; ++i) {
        const Bytes before = random_bytes(random, test.state.device_bytes);
        test.memory.write(before);
        std::shared_ptr<kvf::Job> job;
        {
            kvf::OpenJob open(*test.engine, test.submission(buffer), test.options(), false);
            job = open.job();
            open.stage(1, test.device.make_load_ahead({{0, test.state.bytes}}));
            if (i % 3 == 1) job->fail(KVF_ERR_CANCELLED, "");
            if (i % 2 == 0) sleep_ms(i % 4);
            if (i % 3 != 0) open.commit(test.recorded(), nullptr);
        }
        if (i % 3 == 2) job->fail(KVF_ERR_CANCELLED, "");
        job->cut_short();
        const int32_t status = finish(job).status;
        CHECK(status == KVF_ERR_CANCELLED || (i % 3 == 2 && status == KVF_OK));
        if (i % 3 < 2) CHECK(test.memory.read() == before);
    }
}

void keep_and_free(Test &test, Random &random, const unsigned char *buffer) {
    Driver &d = driver();
    test.engine->trim();
    const uint64_t before = d.count("device_bytes");
    load(test, random, buffer, 0);
    const uint64_t kept = d.count("device_bytes"), calls = d.calls("cuMemAlloc");
    CHECK(kept >= before + test.state.bytes && kept <= before + test.state.bytes + 8 * MiB);
    load(test, random, buffer, 0);
    CHECK(d.count("device_bytes") == kept && d.calls("cuMemAlloc") == calls);
    // Memory that is too small for the next load is freed, at once where the device is short of
    // memory.
    auto larger = test.device.make_load_ahead({{0, 4 * test.state.bytes}});
    CHECK(larger && d.count("device_bytes") >= before + 4 * test.state.bytes);
    while (d.count("device_bytes") >= before + 4 * test.state.bytes + 4 * MiB) sleep_ms(1);
    larger.reset(); // kept
    d.set("device_limit", before + 16 * test.state.bytes + 8 * MiB);
    larger = test.device.make_load_ahead({{0, 16 * test.state.bytes}});
    CHECK(larger);
    larger.reset();
    test.engine->trim();
    while (d.count("device_bytes") != before) sleep_ms(1); // copy threads may free some of it

    d.set("device_limit", d.count("device_bytes") + test.state.bytes / 2);
    CHECK(!test.device.make_load_ahead({{0, test.state.bytes}}));
    d.set("device_limit", UINT64_MAX);
}

// An error while bytes are staged or placed ends the job with that error, and the next job works.
void fail(Test &test, Random &random, const unsigned char *buffer) {
    Driver &d = driver();
    for (const char *name : {"cuMemcpyHtoDAsync", "cuMemcpyDtoDAsync", "cuLaunchKernel",
                             "cuStreamQuery", "cuMemAlloc"}) {
        for (const uint64_t nth : {1, 3}) {
            test.engine->trim();
            d.fail(name, nth, CUDA_ERROR_INVALID_VALUE, 0);
            const uint64_t calls = d.calls(name);
            int32_t status = KVF_OK;
            try {
                const auto load_ahead = test.device.make_load_ahead({{0, test.state.bytes}});
                kvf::OpenJob open(*test.engine, test.submission(buffer), test.options(), false);
                const auto job = open.job();
                open.stage(1, load_ahead);
                open.commit(test.recorded(), nullptr);
                status = finish(job).status;
            } catch (const kvf::Error &error) {
                status = error.status;
            }
            CHECK(status == (d.calls(name) >= calls + nth ? KVF_ERR_DEVICE : KVF_OK));
            d.reset();
            load(test, random, buffer, 0);
        }
    }
}

// A table that is too long, and one whose runs do not follow one another in the buffer, are for a
// kernel nevertheless.
void unusual_tables(std::shared_ptr<kvf::Engine> engine, Random &random) {
    for (const State &state :
         {State(kvf::CudaResidentTable::kRows + 1000, 0), State(3000, kvf::kLongRun)}) {
        Test test(engine, state);
        const Bytes buffer = random_bytes(random, state.bytes);
        const uint64_t calls = driver().simulated() ? driver().calls("cuMemcpyDtoDAsync") : 0;
        load(test, random, buffer.data(), 0);
        if (driver().simulated()) CHECK(driver().calls("cuMemcpyDtoDAsync") <= calls + 1);
    }
}

} // namespace

int main(int argc, char **argv) {
    Random random(argc > 1 ? strtoull(argv[1], nullptr, 10) : 41);
    const Context context;
    const Holdings holdings;
    const bool simulated = driver().simulated();
    auto engine = make_cuda_engine();
    unusual_tables(engine, random);
    for (int round = 0; round < 2; ++round) {
        const State state(random, 6, 600);
        Test test(engine, state);
        auto *pinned = static_cast<unsigned char *>(engine->pool().alloc(state.bytes));
        const Bytes pageable = random_bytes(random, state.bytes);
        std::copy(pageable.begin(), pageable.end(), pinned);
        for (const unsigned char *buffer :
             {static_cast<const unsigned char *>(pinned), pageable.data()}) {
            for (const uint32_t priority : {KVF_PRIORITY_URGENT, KVF_PRIORITY_BACKGROUND}) {
                test.priority = priority;
                for (const int64_t wait_ms : {0, 10}) load(test, random, buffer, wait_ms);
                load_nothing(test, buffer);
                end_otherwise(test, random, buffer);
            }
        }
        if (simulated && round == 0) {
            keep_and_free(test, random, pinned);
            fail(test, random, pinned);
        }
        kvf_buffer_free(pinned);
    }
    engine->close();
    engine.reset();
    holdings.check_same();
    return 0;
}
