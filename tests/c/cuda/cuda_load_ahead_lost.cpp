// Loads ahead on a device that fails when what was brought is moved on, and nothing else is under way: other devices go on, and this
// one says so.
#include "engine/open_job.h"
#include "memory/layout_builder.h"

#include "cuda.hpp"

namespace {

// Rows for a kernel to move first, and then much that is only copied.
constexpr uint64_t kRow = 256, kRows = 4096, kRowBytes = kRow * kRows, kRest = 64 * MiB;
constexpr uint64_t kState = kRowBytes + kRest;

kvf::Layout layout(uint64_t address) {
    kvf::LayoutBuilder builder;
    for (uint64_t i = 0; i < kRows; ++i) builder.add(address + 2 * i * kRow, i * kRow, kRow);
    builder.begin_tensor();
    builder.add(address + 2 * kRowBytes, kRowBytes, kRest);
    return builder.finish();
}

template <class Function>
int32_t load(kvf::Engine &engine, const DeviceMemory &device, unsigned char *buffer,
             Function &&happens) {
    kvf::Submission submission;
    submission.direction = kvf::Direction::Load;
    submission.buffer = buffer;
    submission.buffer_bytes = kState;
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    const auto load_ahead = engine.device(1).make_load_ahead(kState);
    CHECK(load_ahead);
    kvf::OpenJob open(engine, std::move(submission), options, false);
    const uint64_t brought = driver().count("bytes_load");
    open.stage(1, load_ahead);
    // All of it has been brought, and the lane rests.
    while (driver().count("bytes_load") - brought < kState) sleep_ms(1);
    sleep_ms(50);
    happens();
    kvf::Recorded recorded;
    recorded.layouts.emplace_back(1, layout(device.address()));
    open.commit(std::move(recorded), nullptr);
    kvf_completion completion;
    CHECK(open.job()->wait(60 * SECONDS, &completion));
    return completion.status;
}

int32_t move(kvf::Engine &engine, uint32_t index, const DeviceMemory &device, unsigned char *buffer,
             kvf::Direction direction) {
    kvf::Locator locate = engine.locator(); // as for a list of regions
    CHECK(locate(device.address(), kRowBytes).device == index);
    kvf::Submission submission;
    submission.direction = direction;
    submission.buffer = buffer;
    submission.buffer_bytes = kRowBytes;
    kvf::LayoutBuilder builder;
    builder.add(device.address(), 0, kRowBytes);
    kvf::Recorded recorded;
    recorded.layouts.emplace_back(index, builder.finish());
    kvf_completion completion;
    CHECK(kvf::submit_job(engine, std::move(submission), std::move(recorded),
                          KVF_SUBMIT_OPTIONS_INIT, nullptr)
              ->wait(60 * SECONDS, &completion));
    return completion.status;
}

} // namespace

int main() {
    setenv("KVFERRY_STUCK_SECONDS", "1", 1);
    setenv("KVFSIM_DEVICES", "2", 1);
    need_simulation();
    const Driver &d = driver();
    const Context second(1);
    const DeviceMemory other(kRowBytes);
    kvf_engine_options options = KVF_ENGINE_OPTIONS_INIT;
    options.devices = KVF_DEVICES_CUDA;
    Bytes pageable(kState);

    for (const bool is_stuck : {false, true}) {
        const Context first(0);
        const DeviceMemory device(2 * kRowBytes + kRest);
        auto engine = std::make_shared<kvf::Engine>(options);
        const auto trouble = [&] {
            is_stuck ? d.hold("copy", 1, 0) : d.fail("kernel", 1, CUDA_ERROR_ILLEGAL_ADDRESS, 0);
        };
        CHECK(load(*engine, device, pageable.data(), trouble) == KVF_ERR_DEVICE_LOST);
        CHECK(engine->describe().find("\"broken\": true") != std::string::npos);
        for (const auto direction : {kvf::Direction::Load, kvf::Direction::Save}) {
            CHECK(move(*engine, 1, device, pageable.data(), direction) == KVF_ERR_DEVICE_LOST);
            CHECK_OK(move(*engine, 2, other, pageable.data(), direction));
        }
        auto *pinned = static_cast<unsigned char *>(engine->pool().alloc(kRowBytes));
        CHECK_OK(move(*engine, 2, other, pinned, kvf::Direction::Save));
        kvf_buffer_free(pinned);
        const int64_t begin = clock_ns();
        engine->close();
        engine.reset();
        CHECK(clock_ns() - begin < 5 * SECONDS);
        if (is_stuck) exit(0); // to free the memory that this test has would wait for the copy
    }
}
