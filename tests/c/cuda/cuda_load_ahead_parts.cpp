// Loads ahead of several parts of a buffer, as of blocks: parts are staged and placed in the order
// in which they were given, whatever their order in the buffer and their sizes are.
#include "blocks.hpp"
#include "inside.hpp"

namespace {

// Parts whose bytes belong to the device as rows with as much between them.
struct Parts {
    std::vector<kvf::BufferPart> parts;
    std::vector<uint64_t> rows; // of each part
    uint64_t device_bytes = 0, buffer_bytes = 0;

    void add(uint64_t offset, uint64_t row, uint64_t count) {
        parts.push_back({offset, row * count});
        rows.push_back(count);
        device_bytes += 2 * row * count;
        buffer_bytes = std::max(buffer_bytes, offset + row * count);
    }
    // Calls add(part, address from 0 on, offset in the part, bytes) for each row.
    template <class Add>
    void for_each_row(Add &&add) const {
        uint64_t address = 0;
        for (size_t part = 0; part < parts.size(); ++part) {
            const uint64_t row = parts[part].bytes / rows[part];
            for (uint64_t i = 0; i < rows[part]; ++i, address += 2 * row)
                add(part, address, i * row, row);
        }
    }
    kvf::Layout layout(uint64_t memory, const kvf::LoadAhead &load_ahead) const {
        kvf::LayoutBuilder builder;
        size_t last = 0;
        for_each_row([&](size_t part, uint64_t address, uint64_t offset, uint64_t bytes) {
            if (std::exchange(last, part) != part) builder.begin_tensor();
            builder.add(memory + address, load_ahead.bytes_before(parts[part].offset) + offset,
                        bytes);
        });
        return builder.finish();
    }
    Bytes model(const Bytes &buffer) const {
        Bytes memory(device_bytes);
        for_each_row([&](size_t part, uint64_t address, uint64_t offset, uint64_t bytes) {
            std::copy_n(&buffer[parts[part].offset + offset], bytes, &memory[address]);
        });
        return memory;
    }
};

// Loads the parts while the `held`-th copy does not end, calls `meanwhile(memory, expected)`, and
// lets that copy go on.
template <class Meanwhile>
void load(kvf::Engine &engine, Random &random, const Parts &parts, uint32_t priority, uint64_t held,
          Meanwhile &&meanwhile) {
    auto *const buffer = static_cast<unsigned char *>(engine.pool().alloc(parts.buffer_bytes));
    const Bytes content = random_bytes(random, parts.buffer_bytes);
    std::copy(content.begin(), content.end(), buffer);
    const Bytes expected = parts.model(content);
    const DeviceMemory memory{Bytes(parts.device_bytes)};
    const auto load_ahead = engine.device(1).make_load_ahead(parts.parts);
    CHECK(load_ahead);
    if (driver().simulated()) driver().hold("copy", held, 0);
    kvf::OpenJob open(engine, make_submission(Way::Load, buffer, parts.buffer_bytes),
                      options_of(priority), false);
    open.stage(1, load_ahead);
    if (driver().simulated()) CHECK(driver().wait_held(1, 10'000) == 1);
    open.commit(make_recorded(1, parts.layout(memory.address(), *load_ahead)), nullptr);
    if (driver().simulated()) {
        meanwhile(memory, expected);
        driver().release();
    }
    succeed(open.job());
    CHECK(memory.read() == expected);
    kvf_buffer_free(buffer);
}

// Blocks are often allocated one below the other.
void are_placed_in_their_order(kvf::Engine &engine, Random &random) {
    constexpr uint64_t kPart = 16 * MiB, kCount = 3;
    Parts parts;
    for (uint64_t i = kCount; i-- > 0;) parts.add(i * (kPart + 4 * KiB), kPart, 1);
    load(engine, random, parts, KVF_PRIORITY_URGENT, kCount,
         [&](const DeviceMemory &memory, const Bytes &expected) {
             const std::span<const unsigned char> first(expected.data(), 2 * (kCount - 1) * kPart);
             Bytes there(first.size());
             const int64_t begin = clock_ns();
             do {
                 CHECK(clock_ns() - begin < 10 * SECONDS);
                 sleep_ms(1);
                 memory.read(there);
             } while (!std::equal(there.begin(), there.end(), first.begin()));
         });
}

// A part that is too small for a copy of its own elsewhere.
void wait_for_a_small_one(kvf::Engine &engine, Random &random) {
    Parts parts;
    parts.add(0, 500, 20);
    for (uint64_t i = 0; i < 20; ++i) parts.add(MiB + i * (4 * MiB + 4 * KiB), 4 * MiB, 1);
    load(engine, random, parts, KVF_PRIORITY_BACKGROUND, 12,
         [](const DeviceMemory &, const Bytes &) { sleep_ms(20); });
}

// A block has a small region of each tensor.
void small_regions_are_placed_together(kvf::Engine &engine, Random &random) {
    if (!driver().simulated()) return;
    for (const uint64_t rows : {1, 16}) {
        Parts parts;
        for (uint64_t i = 200; i-- > 0;) parts.add(i * 140 * KiB, 128 * KiB / rows, rows);
        const uint64_t copies = driver().calls("cuMemcpyDtoDAsync");
        const uint64_t launches = driver().calls("cuLaunchKernel");
        load(engine, random, parts, KVF_PRIORITY_URGENT, 1,
             [](const DeviceMemory &, const Bytes &) {});
        CHECK(driver().calls("cuMemcpyDtoDAsync") == copies);
        CHECK(driver().calls("cuLaunchKernel") - launches < 20);
    }
}

// A block of a sequence whose cells lie at random has some hundred runs of each tensor, and no
// other block has the same table.
void short_stretches_of_an_irregular_rest_are_placed_together(kvf::Engine &engine, Random &random) {
    const Blocks blocks{
        .cells = Cells::AtRandom, .count = 8, .tensors = 16, .tokens = 256, .row = 64};
    const uint64_t distance = blocks.buffer_bytes() + 4 * KiB, bytes = blocks.count * distance;
    auto *const buffer = static_cast<unsigned char *>(engine.pool().alloc(bytes));
    const Bytes content = random_bytes(random, bytes);
    std::copy(content.begin(), content.end(), buffer);
    Bytes expected(blocks.device_bytes());
    const DeviceMemory memory{expected};
    std::vector<kvf::BufferPart> parts;
    for (uint64_t i = 0; i < blocks.count; ++i) {
        parts.push_back({i * distance, blocks.buffer_bytes()});
        blocks.for_each_fragment(
            i, 0, [] {},
            [&](uint64_t address, uint64_t offset, uint64_t count) {
                std::copy_n(&content[i * distance + offset], count, &expected[address]);
            });
    }
    const auto load_ahead = engine.device(1).make_load_ahead(parts);
    CHECK(load_ahead);
    kvf::Recorded recorded;
    for (uint64_t i = 0; i < blocks.count; ++i) {
        const uint64_t place = load_ahead->bytes_before(parts[i].offset);
        recorded.layouts.emplace_back(1, blocks.layout(i, memory.address(), place, true));
    }
    const bool simulated = driver().simulated();
    const uint64_t copies = simulated ? driver().calls("cuMemcpyDtoDAsync") : 0;
    const uint64_t launches = simulated ? driver().calls("cuLaunchKernel") : 0;
    kvf::OpenJob open(engine, make_submission(Way::Load, buffer, bytes),
                      options_of(KVF_PRIORITY_URGENT), false);
    open.stage(1, load_ahead);
    sleep_ms(20); // all of it is there
    open.commit(std::move(recorded), nullptr);
    succeed(open.job());
    CHECK(memory.read() == expected);
    if (simulated) {
        CHECK(driver().calls("cuMemcpyDtoDAsync") == copies);
        CHECK(driver().calls("cuLaunchKernel") - launches <= blocks.count);
    }
    kvf_buffer_free(buffer);
}

} // namespace

int main() {
    Random random(3);
    const Context context;
    const Holdings holdings;
    auto engine = make_cuda_engine();
    are_placed_in_their_order(*engine, random);
    wait_for_a_small_one(*engine, random);
    small_regions_are_placed_together(*engine, random);
    short_stretches_of_an_irregular_rest_are_placed_together(*engine, random);
    engine->close();
    engine.reset();
    holdings.check_same();
    return 0;
}
