// Regions that lie in several allocations, as the tensors of a program do: rows at one pitch and
// runs without gaps are joined within an allocation, and never across two, for a driver refuses
// such a copy.
#include <memory>

#include "cuda.hpp"

namespace {

constexpr uint64_t kAllocations = 24;

// Memory that a driver gives in the order of a stream.
class OrderedMemory {
public:
    OrderedMemory(const Stream &stream, uint64_t bytes) : stream_(stream) {
        CHECK_CUDA(driver().cuMemAllocAsync(&address_, bytes, stream.get()));
    }
    ~OrderedMemory() { driver().cuMemFreeAsync(address_, stream_.get()); }
    OrderedMemory(const OrderedMemory &) = delete;
    OrderedMemory &operator=(const OrderedMemory &) = delete;

    uint64_t address() const { return address_; }

private:
    const Stream &stream_;
    CUdeviceptr address_ = 0;
};

// `rows` regions in each allocation, the first one at `first`.
struct Shape {
    uint64_t width, pitch, rows, first;
};

Regions regions_of(const std::vector<uint64_t> &allocations, const Shape &shape) {
    Regions regions;
    uint64_t offset = 0;
    for (const uint64_t allocation : allocations) {
        for (uint64_t row = 0; row < shape.rows; ++row, offset += shape.width) {
            regions.push_back(
                {allocation + shape.first + row * shape.pitch, shape.width, 1, 0, offset, 0});
        }
    }
    return regions;
}

// Loads bytes and saves them again. Returns of how many segments the save consisted.
uint64_t move(const Engine &engine, const Regions &regions, Kind kind, uint32_t priority) {
    static Random random(28);
    const Buffer buffer(engine, kind, regions.back().offset + regions.back().width);
    const Bytes content = random_bytes(random, buffer.bytes());
    buffer.fill(content);
    succeed(start(engine, Way::Load, regions, buffer, priority));
    buffer.fill(0);
    const kvf_completion save = succeed(start(engine, Way::Save, regions, buffer, priority));
    CHECK(buffer.holds(content));
    return save.segments;
}

template <class Memory>
std::vector<uint64_t> addresses_of(const std::vector<std::unique_ptr<Memory>> &memory) {
    std::vector<uint64_t> addresses;
    for (const auto &one : memory) addresses.push_back(one->address());
    std::sort(addresses.begin(), addresses.end());
    return addresses;
}

void in_memory_of_its_own(const Engine &engine, uint64_t bytes, std::span<const Shape> shapes) {
    std::vector<std::unique_ptr<DeviceMemory>> memory;
    for (uint64_t i = 0; i < kAllocations; ++i) {
        memory.push_back(std::make_unique<DeviceMemory>(bytes));
    }
    for (const Shape &shape : shapes) {
        const Regions regions = regions_of(addresses_of(memory), shape);
        for (const Kind kind : {Kind::Pool, Kind::Pageable}) {
            for (const uint32_t priority : {KVF_PRIORITY_BACKGROUND, KVF_PRIORITY_URGENT}) {
                CHECK(move(engine, regions, kind, priority) == kAllocations);
            }
        }
    }
}

// What a driver tells of such memory need not be what it lies in. Where there is no hole regions
// may be joined.
void in_memory_of_a_pool(const Engine &engine, uint64_t bytes, std::span<const Shape> shapes) {
    if (!driver().cuMemAllocAsync || !driver().cuMemFreeAsync) return;
    const Stream stream;
    {
        std::vector<std::unique_ptr<OrderedMemory>> memory;
        for (uint64_t i = 0; i < kAllocations; ++i) {
            memory.push_back(std::make_unique<OrderedMemory>(stream, bytes));
        }
        stream.synchronize();
        for (const Shape &shape : shapes) {
            const Regions regions = regions_of(addresses_of(memory), shape);
            const uint64_t segments = move(engine, regions, Kind::Pool, KVF_PRIORITY_URGENT);
            const bool without_holes = shape.rows == 1 || shape.pitch == shape.width;
            const uint64_t expected = without_holes ? kAllocations : regions.size();
            CHECK(driver().simulated() ? segments == expected : segments <= expected);
        }
    }
    stream.synchronize();
}

} // namespace

int main() {
    const Context context;
    const Holdings holdings;
    const uint64_t bytes = driver().simulated() ? 128 * KiB : 2 * MiB;
    if (driver().simulated()) driver().set("guard_pages", 0); // a real one often gives neighbours
    const Shape shapes[] = {
        {bytes, 0, 1, 0},                    // all of them, end to end
        {bytes / 2, 0, 1, bytes / 4},        // long rows, one in each
        {4 * KiB, 0, 1, 8 * KiB},            // rows of a block
        {256, 0, 1, 1024},                   // narrow ones
        {2 * KiB, 8 * KiB, 16, bytes % 999}, // a block in each
        {2 * KiB, bytes / 32, 32, 0},        // at one pitch through all of them
        {3 * KiB, 3 * KiB, 16, 0},           // a run in each
        {bytes / 16, bytes / 16, 16, 0},     // no gap anywhere
    };
    Engine engine;
    in_memory_of_its_own(engine, bytes, shapes);
    in_memory_of_a_pool(engine, bytes, shapes);
    engine.destroy();
    holdings.check_same();
    return 0;
}
