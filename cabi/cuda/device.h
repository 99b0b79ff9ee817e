// A CUDA device: its context, a pump for each direction, loads ahead and snapshots.
//
// The room, from the bottom up:
//
//     driver_api, driver            the driver's functions, opened at run time
//     context, pinner, allocation   a device's context; pinned host memory; whose a pointer is
//     memory, arena, free_list,
//         pinned_budget             the library's own memory, in segments or kept for reuse
//     kernels, tables               the gather and scatter kernels, and the rows that they move
//     lane_memory, slot             what a piece needs while it moves
//     planner, copies               which pieces, which way, where in staging; calls of the driver
//     pacer, pace                   how large background copies are, and how many are queued
//     lane_schedule, lane           which leg moves next; the pump
//     ahead_memory, placer,
//         load_ahead                loads ahead
//     snapshots                     copies aside, for saves of caches that change
//     device                        all of these as a device of the engine's
//     stream_events, stream_waits   jobs that follow a caller's stream; streams that wait for jobs
#pragma once

#include "cuda/lane.h"
#include "cuda/load_ahead.h"
#include "cuda/snapshots.h"
#include "jobs/device.h"

namespace kvf {

class CudaDevice final : public Device {
public:
    // The most host memory that all devices of an engine may pin together, in addition to
    // CudaLaneMemory::kLeastPinned for each lane. It is all that two devices can use.
    static constexpr uint64_t kPinnedBudget =
        4 * (CudaLaneMemory::kMostPinned - CudaLaneMemory::kLeastPinned);

    CudaDevice(JobOwner &owner, std::shared_ptr<const CudaContext> context, uint32_t index,
               uint64_t staging_bytes, std::shared_ptr<CudaPinnedBudget> budget,
               uint32_t copy_threads);
    ~CudaDevice() override;

    void check_usable() override;
    std::string describe() const override;
    void submit(Leg &leg) override { lane(leg.direction).submit(leg); }
    void extend(Leg &leg, Layout &&part) override {
        lane(leg.direction).extend(leg, std::move(part));
    }
    void close(Leg &leg) override { lane(leg.direction).close(leg); }
    void announce(Direction direction) override { lane(direction).announce(); }
    void cut_short(Leg &leg) override { lane(leg.direction).cut_short(leg); }
    void cut_short_stopping() override;
    Snapshot snapshot(const Layout &layout, unsigned char *) override {
        return snapshots_->take(layout);
    }
    std::shared_ptr<LoadAhead> make_load_ahead(const std::vector<BufferPart> &parts) override;
    void trim() override;
    void stop() override;

private:
    CudaLane &lane(Direction direction) { return direction == Direction::Save ? *save_ : *load_; }
    uint64_t pinned_bytes() const;

    const std::shared_ptr<const CudaContext> context_;
    std::unique_ptr<CudaKernels> kernels_;
    std::string no_kernels_; // the reason, if kernels_ is NULL
    const uint64_t staging_bytes_;
    const std::shared_ptr<CudaPinnedBudget> budget_;
    ThreadPool copy_threads_;
    CudaAheadPool ahead_;
    std::unique_ptr<CudaLane> save_, load_;
    std::unique_ptr<CudaSnapshots> snapshots_;
};

} // namespace kvf
