// A CUDA device: its context, a pump for each direction, and the copies aside that snapshots need.
#pragma once

#include "cuda/lane.h"
#include "jobs/device.h"

namespace kvf {

class CudaDevice final : public Device {
public:
    CudaDevice(JobOwner &owner, std::shared_ptr<const CudaContext> context, uint32_t index,
               uint64_t staging_bytes, uint32_t copy_threads);
    ~CudaDevice() override;

    void check_usable() override;
    std::string describe() const override;
    void submit(Leg &leg) override { lane(leg.direction).submit(leg); }
    void extend(Leg &leg, Layout &&part) override {
        lane(leg.direction).extend(leg, std::move(part));
    }
    void finish(Leg &leg) override { lane(leg.direction).finish(leg); }
    void announce(Direction direction) override { lane(direction).announce(); }
    void cut_short(Leg &leg) override { lane(leg.direction).cut_short(leg); }
    void cut_short_stopping() override {
        save_->cut_short_stopping();
        load_->cut_short_stopping();
    }
    Snapshot snapshot(const Layout &layout, unsigned char *buffer) override;
    std::shared_ptr<Landing> make_landing(uint64_t bytes) override {
        return landings_ ? landings_->make(bytes) : nullptr;
    }
    void trim() override;
    void stop() override;

private:
    class SnapshotMemory;

    CUdeviceptr allocate_snapshot(uint64_t bytes);
    void leave_snapshot(CUdeviceptr address) noexcept;
    void free_snapshots() noexcept;
    CudaLane &lane(Direction direction) { return direction == Direction::Save ? *save_ : *load_; }

    const std::shared_ptr<const CudaContext> context_;
    std::unique_ptr<CudaKernels> kernels_;
    std::string no_kernels_; // why they are missing
    uint64_t staging_bytes_;
    ThreadPool crew_;
    std::unique_ptr<CudaLandings> landings_; // with kernels only
    std::unique_ptr<CudaLane> save_, load_;

    std::mutex snapshot_mutex_; // one snapshot is taken at a time
    CUstream snapshot_stream_ = nullptr;
    bool stream_ordered_ = false; // their memory is taken and freed in the order of the stream
    std::mutex left_mutex_;
    std::vector<CUdeviceptr> left_;      // what has been moved: to be freed
    std::atomic<uint32_t> snapshots_{0}; // that have been allocated and not freed
    std::mutex freeing_mutex_;           // held while some is freed
    CUdeviceptr snapshot_table_ = 0;
    std::unique_ptr<CudaRowTable> snapshot_rows_;
    std::atomic<uint64_t> snapshot_pinned_{0}; // bytes of it
};

// What a device pointer belongs to, and whether a pointer is one.
struct CudaPlace {
    int ordinal;
    uint64_t begin, end; // of the allocation, as far as the driver tells
    // All of it is memory, as cuMemAlloc gives it. (That such memory can be shared with another process in the old way
    // tells.) Else it may be addresses that were set aside for cuMemMap, and some have nothing behind them.
    bool in_one_piece;
};
// False for memory that is not a device's. Throws where the driver does not tell.
bool cuda_place(const CudaContext &context, uint64_t address, CudaPlace &place);

} // namespace kvf
