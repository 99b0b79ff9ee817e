// Blocks that reach further than 32 bits count, and pitches that a two-dimensional copy refuses.
#include "cuda.hpp"

namespace {

constexpr uint64_t kBeyondPitch = 2 * GiB + 4 * KiB; // CU_DEVICE_ATTRIBUTE_MAX_PITCH is 2 GiB - 1

void move_rows(kvf_engine engine, const DeviceMemory &device, const Buffer &buffer,
               const kvf_region &region, unsigned seed) {
    Random random(seed);
    const Regions regions = {region};
    std::vector<Bytes> rows;
    const auto in_memory = [&](uint64_t i) { return region.address + i * region.pitch; };
    const auto in_buffer = [&](uint64_t i) {
        return buffer.data() + region.offset + i * region.buffer_pitch;
    };
    for (uint64_t i = 0; i < region.rows; ++i) {
        rows.push_back(random_bytes(random, region.width));
        device.write(rows[i], in_memory(i) - device.address());
    }
    succeed(start(engine, Way::Save, regions, buffer));
    for (uint64_t i = 0; i < region.rows; ++i) {
        CHECK(memcmp(in_buffer(i), rows[i].data(), region.width) == 0);
        rows[i] = random_bytes(random, region.width);
        memcpy(in_buffer(i), rows[i].data(), region.width);
    }
    succeed(start(engine, Way::Load, regions, buffer, KVF_PRIORITY_BACKGROUND));
    Bytes found(region.width);
    for (uint64_t i = 0; i < region.rows; ++i) {
        device.read(found, in_memory(i) - device.address());
        CHECK(found == rows[i]);
    }
}

} // namespace

int main() {
    setenv("KVFSIM_DEVICE_BYTES", "0x600000000", 1); // 24 GiB
    const Context context;
    const Holdings holdings;
    Engine engine;
    {
        const DeviceMemory device(20 * GiB);
        const Buffer pageable(engine, Kind::Pageable, 20 * GiB);
        // Copied as a block, gathered, and too wide for a row of the kernel's.
        for (const uint64_t width : {uint64_t{2000}, uint64_t{100}, 600 * KiB}) {
            const uint64_t address = device.address() + 1;
            move_rows(engine, device, pageable, {address, width, 16, GiB, 3, width}, 1);
            move_rows(engine, device, pageable, {address, width, 9, kBeyondPitch, 5 * GiB, width},
                      2);
            const kvf_region apart = {address, width, 9, width + 5, 0, kBeyondPitch};
            move_rows(engine, device, pageable, apart, 3);
            if (driver().simulated()) { // so much memory is not pinned in a moment on a real one
                const Buffer pinned(engine, Kind::Registered, 20 * GiB);
                move_rows(engine, device, pinned, apart, 4);
            }
        }
        const kvf_region run = {device.address() + 3 * GiB + 3, 33 * MiB + 1, 1, 0, 4 * GiB + 7, 0};
        move_rows(engine, device, pageable, run, 5);
    }
    engine.destroy();
    holdings.check_same();
    return 0;
}
