// Tensors that are fragmented alike are gathered and scattered through one table, which travels to
// the device once; and the bytes are right, whatever other tables come between.
#include "inside.hpp"

namespace {

constexpr uint64_t kTensors = 12, kCells = 3000, kRow = 260;
constexpr uint64_t kTensorBytes = 4 * kCells * kRow; // with the cells of others

// Cells of one sequence at random places of `tensors` tensors, as libllama names them.
struct Fragmented {
    std::vector<uint64_t> cells;
    uint64_t tensors = kTensors;

    explicit Fragmented(Random &random) {
        for (uint64_t cell = 0; cells.size() < kCells; cell += 1 + random() % 4)
            cells.push_back(cell);
    }
    uint64_t bytes() const { return tensors * (4 + kCells * kRow); }

    template <class Function>
    void for_each(Function &&function) const { // tensor, place in memory, place in the buffer
        uint64_t offset = 0;
        for (uint64_t tensor = 0; tensor < tensors; ++tensor) {
            offset += 4; // libllama's metadata
            for (const uint64_t cell : cells) {
                function(tensor, tensor * kTensorBytes + cell * kRow, offset);
                offset += kRow;
            }
        }
    }
    kvf::Layout layout(uint64_t address) const {
        kvf::LayoutBuilder builder;
        uint64_t last = 0;
        for_each([&](uint64_t tensor, uint64_t place, uint64_t offset) {
            if (tensor != last) builder.begin_tensor();
            last = tensor;
            builder.add(address + place, offset, kRow);
        });
        return builder.finish();
    }
    void model(Way way, Bytes &memory, Bytes &buffer) const {
        for_each([&](uint64_t, uint64_t place, uint64_t offset) {
            const auto m = memory.begin() + static_cast<std::ptrdiff_t>(place);
            const auto b = buffer.begin() + static_cast<std::ptrdiff_t>(offset);
            way == Way::Save ? std::copy_n(m, kRow, b) : std::copy_n(b, kRow, m);
        });
    }
};

std::shared_ptr<kvf::Job> begin(kvf::Engine &engine, Way way, const Fragmented &what,
                                uint64_t address, unsigned char *buffer, uint32_t priority) {
    return kvf::submit_job(engine, make_submission(way, buffer, what.bytes()),
                           make_recorded(1, what.layout(address)), options_of(priority), nullptr);
}

// Small tensors share one slot: an event for the table, and one for the copies.
void small_ones_together(kvf::Engine &engine, uint64_t address) {
    constexpr uint64_t kSmall = 16, kRuns = 64, kBytes = 256;
    kvf::LayoutBuilder builder;
    uint64_t offset = 0;
    for (uint64_t tensor = 0; tensor < kSmall; ++tensor, offset += 12) {
        builder.begin_tensor();
        for (uint64_t at = 0, gap = 2, i = 0; i < kRuns; at += gap, gap = 5 - gap, ++i) {
            builder.add(address + tensor * MiB / 4 + at * kBytes, offset, kBytes);
            offset += kBytes;
        }
    }
    auto *const buffer = static_cast<unsigned char *>(engine.pool().alloc(offset));
    const uint64_t before = driver().simulated() ? driver().calls("cuEventRecord") : 0;
    succeed(kvf::submit_job(engine, make_submission(Way::Save, buffer, offset),
                            make_recorded(1, builder.finish()), options_of(KVF_PRIORITY_URGENT),
                            nullptr));
    CHECK(!driver().simulated() || driver().calls("cuEventRecord") - before <= 2);
    kvf_buffer_free(buffer);
}

// Memory that was freed while staging was in use is allocated again.
void trimmed_meanwhile(kvf::Engine &engine, const Fragmented &what, const DeviceMemory &device) {
    if (!driver().simulated()) return;
    constexpr uint64_t kNarrow = 512, kRows = 4000; // gathered without a table
    auto *a = static_cast<unsigned char *>(engine.pool().alloc(what.bytes()));
    auto *b = static_cast<unsigned char *>(engine.pool().alloc(kRows * kNarrow));
    kvf::Layout layout;
    layout.regions.push_back({device.address(), kNarrow, kRows, 2 * kNarrow, 0, kNarrow});
    layout.bytes = kRows * kNarrow;
    driver().set("latency_us", 100'000);
    const uint64_t kernels = driver().calls("cuLaunchKernel");
    const auto job =
        kvf::submit_job(engine, make_submission(Way::Save, b, kRows * kNarrow),
                        make_recorded(1, std::move(layout)), KVF_SUBMIT_OPTIONS_INIT, nullptr);
    while (driver().calls("cuLaunchKernel") == kernels) sleep_ms(1);
    engine.trim();
    succeed(job);
    driver().set("latency_us", 0);
    const uint64_t before = driver().count("bytes_load");
    succeed(begin(engine, Way::Save, what, device.address(), a, KVF_PRIORITY_URGENT));
    CHECK(driver().count("bytes_load") - before <= kCells * sizeof(kvferry_row));
    kvf_buffer_free(a);
    kvf_buffer_free(b);
}

// A buffer of the pool, or pageable memory.
class StateBuffer {
public:
    StateBuffer(kvf::Engine &engine, bool pinned, uint64_t bytes)
        : pooled_(pinned ? engine.pool().alloc(bytes) : nullptr), pageable_(pinned ? 0 : bytes),
          bytes_(bytes) {}
    ~StateBuffer() {
        if (pooled_) kvf_buffer_free(pooled_);
    }
    StateBuffer(const StateBuffer &) = delete;
    StateBuffer &operator=(const StateBuffer &) = delete;

    unsigned char *data() {
        return pooled_ ? static_cast<unsigned char *>(pooled_) : pageable_.data();
    }
    void clear() { std::fill_n(data(), bytes_, 0xAA); }
    void fill(const Bytes &content) { std::copy(content.begin(), content.end(), data()); }
    bool holds_save_of(const Fragmented &what, Bytes &memory) {
        Bytes expected(bytes_, 0xAA);
        what.model(Way::Save, memory, expected);
        return std::equal(expected.begin(), expected.end(), data());
    }

private:
    void *const pooled_;
    Bytes pageable_;
    const uint64_t bytes_;
};

// Two allocations of a device with the same content.
struct Test {
    Random random{8};
    Bytes memory = random_bytes(random, kTensors *kTensorBytes);
    const DeviceMemory device{memory}, second{memory};
};

void table_is_sent_once(kvf::Engine &engine, Test &test, const Fragmented &one, StateBuffer &a,
                        uint32_t priority) {
    a.clear();
    const uint64_t before = driver().simulated() ? driver().count("bytes_load") : 0;
    succeed(begin(engine, Way::Save, one, test.device.address(), a.data(), priority));
    if (driver().simulated()) {
        const uint64_t sent = driver().count("bytes_load") - before;
        CHECK(sent <= kCells * sizeof(kvferry_row));
    }
    CHECK(a.holds_save_of(one, test.memory));
}

// With tables of their own.
void two_saves_at_once(kvf::Engine &engine, Test &test, const Fragmented &one,
                       const Fragmented &other, StateBuffer &a, StateBuffer &b, uint32_t priority) {
    const uint64_t address = test.device.address();
    a.clear();
    b.clear();
    const auto first = begin(engine, Way::Save, one, address, a.data(), priority);
    succeed(begin(engine, Way::Save, other, address, b.data(), priority));
    succeed(first);
    CHECK(a.holds_save_of(one, test.memory));
    CHECK(b.holds_save_of(other, test.memory));
}

void two_loads_at_once(kvf::Engine &engine, Test &test, const Fragmented &one,
                       const Fragmented &other, StateBuffer &a, StateBuffer &b, uint32_t priority) {
    Bytes new_a = random_bytes(test.random, one.bytes()),
          new_b = random_bytes(test.random, other.bytes());
    a.fill(new_a);
    b.fill(new_b);
    Bytes changed = test.memory, changed_second = test.memory;
    test.second.write(test.memory);
    const auto load = begin(engine, Way::Load, one, test.device.address(), a.data(), priority);
    succeed(begin(engine, Way::Load, other, test.second.address(), b.data(), priority));
    succeed(load);
    one.model(Way::Load, changed, new_a);
    other.model(Way::Load, changed_second, new_b);
    CHECK(test.device.read() == changed);
    CHECK(test.second.read() == changed_second);
    test.device.write(test.memory);
}

} // namespace

int main() {
    const Context context;
    Test test;
    const Holdings holdings;
    auto engine = make_cuda_engine();
    const Fragmented one(test.random), other(test.random);

    for (const uint32_t priority : {KVF_PRIORITY_BACKGROUND, KVF_PRIORITY_URGENT}) {
        for (const bool pinned : {true, false}) {
            StateBuffer a(*engine, pinned, one.bytes()), b(*engine, pinned, other.bytes());
            table_is_sent_once(*engine, test, one, a, priority);
            for (int round = 0; round < 3; ++round) {
                two_saves_at_once(*engine, test, one, other, a, b, priority);
                two_loads_at_once(*engine, test, one, other, a, b, priority);
            }
        }
    }
    small_ones_together(*engine, test.device.address());
    trimmed_meanwhile(*engine, one, test.device);
    engine->close();
    engine.reset();
    holdings.check_same();
    return 0;
}
