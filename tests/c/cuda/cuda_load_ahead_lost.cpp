// Loads ahead on a device that fails when staged bytes are placed, and nothing else is under way:
// other devices go on, and this one says so.
#include "inside.hpp"

namespace {

// Rows for a kernel to move first, and then much that is only copied.
constexpr uint64_t kRow = 256, kRows = 4096, kAllRows = kRow * kRows, kRest = 64 * MiB;
constexpr uint64_t kState = kAllRows + kRest;

kvf::Layout layout(uint64_t address) {
    kvf::LayoutBuilder builder;
    for (uint64_t i = 0; i < kRows; ++i) builder.add(address + 2 * i * kRow, i * kRow, kRow);
    builder.begin_tensor();
    builder.add(address + 2 * kAllRows, kAllRows, kRest);
    return builder.finish();
}

template <class Function>
int32_t load(kvf::Engine &engine, const DeviceMemory &device, unsigned char *buffer,
             Function &&happens) {
    const auto load_ahead = engine.device(1).make_load_ahead({{0, kState}});
    CHECK(load_ahead);
    kvf::OpenJob open(engine, make_submission(Way::Load, buffer, kState), KVF_SUBMIT_OPTIONS_INIT,
                      false);
    const uint64_t before = driver().count("bytes_load");
    open.stage(1, load_ahead);
    // All of it has been staged, and the lane rests.
    while (driver().count("bytes_load") - before < kState) sleep_ms(1);
    sleep_ms(50);
    happens();
    open.commit(make_recorded(1, layout(device.address())), nullptr);
    return finish(open.job()).status;
}

int32_t move(kvf::Engine &engine, uint32_t index, const DeviceMemory &device, unsigned char *buffer,
             Way way) {
    kvf::Locator locate = engine.locator(); // as for a list of regions
    CHECK(locate(device.address(), kAllRows).device == index);
    kvf::LayoutBuilder builder;
    builder.add(device.address(), 0, kAllRows);
    return finish(kvf::submit_job(engine, make_submission(way, buffer, kAllRows),
                                  make_recorded(index, builder.finish()), KVF_SUBMIT_OPTIONS_INIT,
                                  nullptr))
        .status;
}

} // namespace

int main() {
    setenv("KVFERRY_STUCK_SECONDS", "1", 1);
    need_simulation(2);
    const Driver &d = driver();
    const Context second(1);
    const DeviceMemory other(kAllRows);
    Bytes pageable(kState);

    for (const bool is_stuck : {false, true}) {
        const Context first(0);
        const DeviceMemory device(2 * kAllRows + kRest);
        auto engine = make_cuda_engine();
        const auto trouble = [&] {
            is_stuck ? d.hold("copy", 1, 0) : d.fail("kernel", 1, CUDA_ERROR_ILLEGAL_ADDRESS, 0);
        };
        CHECK(load(*engine, device, pageable.data(), trouble) == KVF_ERR_DEVICE_LOST);
        CHECK(engine->describe().find("\"broken\": true") != std::string::npos);
        for (const Way way : {Way::Load, Way::Save}) {
            CHECK(move(*engine, 1, device, pageable.data(), way) == KVF_ERR_DEVICE_LOST);
            CHECK_OK(move(*engine, 2, other, pageable.data(), way));
        }
        auto *pinned = static_cast<unsigned char *>(engine->pool().alloc(kAllRows));
        CHECK_OK(move(*engine, 2, other, pinned, Way::Save));
        kvf_buffer_free(pinned);
        const int64_t begin = clock_ns();
        engine->close();
        engine.reset();
        CHECK(clock_ns() - begin < 5 * SECONDS);
        if (is_stuck) exit(0); // to free the memory that this test has would wait for the copy
    }
}
