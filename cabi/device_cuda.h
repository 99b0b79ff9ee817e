// A CUDA device: its context, a pump for each direction, and the copies aside that snapshots need.
#pragma once

#include "cuda_lane.h"
#include "device.h"

namespace kvf {

class CudaDevice final : public Device {
public:
    CudaDevice(Engine &engine, std::shared_ptr<const CudaContext> context, uint32_t index,
               uint64_t staging_bytes, uint32_t copy_threads);
    ~CudaDevice() override;

    void check_usable() override;
    std::string describe() const override;
    void submit(Leg &leg) override { lane(leg.direction).submit(leg); }
    void extend(Leg &leg, Layout &&part) override {
        lane(leg.direction).extend(leg, std::move(part));
    }
    void finish(Leg &leg) override { lane(leg.direction).finish(leg); }
    void expect(Direction direction) override { lane(direction).expect(); }
    void poke(Direction direction) override { lane(direction).poke(); }
    Snapshot snapshot(const Layout &layout, unsigned char *buffer) override;
    void stop() override;

private:
    class SnapshotMemory;

    CudaLane &lane(Direction direction) { return direction == Direction::Save ? *save_ : *load_; }

    const std::shared_ptr<const CudaContext> context_;
    std::unique_ptr<CudaKernels> kernels_;
    std::string no_kernels_; // why they are missing
    uint64_t staging_bytes_;
    Crew crew_;
    std::unique_ptr<CudaLane> save_, load_;

    std::mutex snapshot_mutex_; // one snapshot is taken at a time
    CUstream snapshot_stream_ = nullptr;
    CUdeviceptr snapshot_table_ = 0;
    std::unique_ptr<CudaRowTable> snapshot_rows_;
};

// What a device pointer belongs to, and whether a pointer is one.
struct CudaPlace {
    int ordinal;
    uint64_t begin, end; // of the allocation, as far as the driver tells
};
// False for memory that is not a device's. Throws where the driver does not tell.
bool cuda_place(const CudaContext &context, uint64_t address, CudaPlace &place);

} // namespace kvf
