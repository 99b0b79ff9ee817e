#include "engine/regions.h"

#include <utility>

#include "engine/open_job.h"
#include "memory/buffer_checks.h"
#include "memory/layout_builder.h"

namespace kvf {
namespace {

uint64_t extent(const kvf_region &region) {
    return (region.rows - 1) * (region.rows > 1 ? region.pitch : 0) + region.width;
}

// Finds the device of each region, and joins the regions of each device. Throws
// KVF_ERR_UNREACHABLE, and KVF_ERR_INVALID_ARGUMENT for host memory that a load could not write.
Recorded lay_out(const Engine &engine, Direction direction, const kvf_region *regions,
                 uint64_t count) {
    Locator locate = engine.locator();
    WritableCheck writable;
    std::vector<LayoutBuilder> builders(engine.device_count());
    std::vector<uint64_t> allocations(engine.device_count());
    for (uint64_t i = 0; i < count; ++i) {
        const kvf_region &region = regions[i];
        const uint64_t bytes = extent(region);
        const auto [device, allocation] = locate(region.address, bytes);
        if (device == Device::kHost && direction == Direction::Load &&
            !writable(region.address, bytes)) {
            throw Error(KVF_ERR_INVALID_ARGUMENT, format("region %llu cannot be written",
                                                         static_cast<unsigned long long>(i)));
        }
        if (allocation != std::exchange(allocations[device], allocation)) {
            builders[device].begin_allocation();
        }
        builders[device].add(region);
    }
    Recorded recorded;
    for (uint32_t device = 0; device < builders.size(); ++device) {
        recorded.fragments += builders[device].fragments();
        Layout layout = builders[device].finish();
        if (layout.empty()) continue;
        recorded.segments += layout.segments();
        recorded.bytes += layout.bytes;
        recorded.layouts.emplace_back(device, std::move(layout));
    }
    return recorded;
}

} // namespace

void submit_regions(Engine &engine, Direction direction, const kvf_region *regions, uint64_t count,
                    void *buffer, uint64_t bytes, const kvf_submit_options &options,
                    kvf_job *handle) {
    Submission submission;
    submission.submitted_ns = now_ns();
    const uint64_t needed = regions_size(regions, count);
    check_room(needed, bytes);
    if (count > 0 && !buffer) throw Error(KVF_ERR_INVALID_ARGUMENT, "buffer is NULL");
    if (needed > 0) check_accessible(direction, buffer, needed);
    Recorded recorded = lay_out(engine, direction, regions, count);
    DeviceSet moved = 0;
    for (const auto &[device, layout] : recorded.layouts) moved |= device_set(device);
    submission.direction = direction;
    submission.buffer = static_cast<unsigned char *>(buffer);
    submission.buffer_bytes = needed;
    submission.gate = engine.make_gate(options, moved);
    submit_job(engine, std::move(submission), std::move(recorded), options, handle);
}

} // namespace kvf
