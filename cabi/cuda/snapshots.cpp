#include "cuda/snapshots.h"

#include "memory/layout_builder.h"

namespace kvf {
namespace {

constexpr uint32_t kBlocks = 128; // of a kernel's grid: the device does nothing else meanwhile

} // namespace

// Device memory that holds a layout's bytes, one after another.
class CudaSnapshots::Memory {
public:
    Memory(CudaSnapshots &snapshots, uint64_t bytes)
        : snapshots_(snapshots), address_(snapshots.allocate(bytes)) {}
    ~Memory() { snapshots_.leave(address_); }
    Memory(const Memory &) = delete;
    Memory &operator=(const Memory &) = delete;

    CUdeviceptr address() const { return address_; }

private:
    CudaSnapshots &snapshots_;
    const CUdeviceptr address_;
};

// Where the next bytes go in a snapshot, and the layout of what it holds.
struct CudaSnapshots::Packed {
    CUdeviceptr at;
    LayoutBuilder layout;
};

CudaSnapshots::CudaSnapshots(const CudaContext &context, const CudaKernels *kernels,
                             ThreadPool &copy_threads)
    : context_(context), driver_(context.driver()), kernels_(kernels), copy_threads_(copy_threads),
      max_pitch_(static_cast<uint64_t>(context.attribute(CU_DEVICE_ATTRIBUTE_MAX_PITCH))),
      stream_ordered_(driver_.cuMemAllocAsync && driver_.cuMemFreeAsync &&
                      context.attribute(CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)) {
    const CudaCurrent current(context_);
    driver_.check(driver_.cuStreamCreateWithPriority(&stream_, CU_STREAM_NON_BLOCKING, 0),
                  "cuStreamCreateWithPriority");
}

CudaSnapshots::~CudaSnapshots() {
    context_.clean_up([this](const CudaDriver &driver) { driver.cuStreamDestroy(stream_); });
}

// All bytes are packed into one allocation by copies within the device, which run at the speed of
// its memory. What remains to be moved are long runs of that allocation.
Device::Snapshot CudaSnapshots::take(const Layout &layout) {
    std::lock_guard lock(taking_mutex_);
    const CudaCurrent current(context_);
    auto memory = std::make_shared<Memory>(*this, layout.bytes);
    Packed packed{memory->address(), {}};
    try {
        pack(layout, packed);
    } catch (...) {
        driver_.cuStreamSynchronize(stream_); // what was queued must not outlive the memory
        throw;
    }
    synchronize();
    return {packed.layout.finish(), std::move(memory)};
}

void CudaSnapshots::pack(const Layout &layout, Packed &packed) {
    for (const kvf_region &region : layout.regions) pack_region(region, packed);
    if (!layout.spans.empty()) pack_irregular(layout, packed);
}

void CudaSnapshots::pack_region(const kvf_region &region, Packed &packed) {
    const CUdeviceptr to = packed.at;
    if (region.rows == 1 || region.pitch > max_pitch_) {
        for (uint64_t i = 0; i < region.rows; ++i) {
            copy(to + i * region.width, region.address + i * region.pitch, region.width);
        }
    } else {
        CUDA_MEMCPY2D rows{};
        rows.srcMemoryType = rows.dstMemoryType = CU_MEMORYTYPE_DEVICE;
        rows.srcDevice = region.address;
        rows.srcPitch = region.pitch;
        rows.dstDevice = to;
        rows.dstPitch = region.width;
        rows.WidthInBytes = region.width;
        rows.Height = region.rows;
        driver_.check(driver_.cuMemcpy2DAsync(&rows, stream_), "cuMemcpy2DAsync");
    }
    packed.layout.add(
        {to, region.width, region.rows, region.width, region.offset, region.buffer_pitch});
    packed.at += region.width * region.rows;
}

void CudaSnapshots::pack_irregular(const Layout &layout, Packed &packed) {
    if (kernels_ && !rows_) {
        rows_ = std::make_unique<CudaRowTable>(context_);
        pinned_bytes_ = rows_->pinned_bytes();
    }
    Cursor cursor(layout);
    cursor.skip_regions();
    while (!cursor.at_end()) {
        // Offsets within one launch have 32 bits.
        const Piece piece = cursor.next(UINT32_MAX, CudaRowTable::kRows);
        if (kernels_) gather(piece, packed.at);
        for (uint64_t i = 0; i < piece.count; ++i) {
            const Run run = piece.run(i);
            if (!kernels_) copy(packed.at, run.address, run.bytes);
            packed.layout.add(packed.at, run.offset, run.bytes);
            packed.at += run.bytes;
        }
    }
}

void CudaSnapshots::gather(const Piece &piece, CUdeviceptr to) {
    rows_->clear();
    rows_->add(piece, 0);
    rows_->send(stream_);
    kernels_->launch(Direction::Save, to, rows_->rows(), kBlocks, stream_);
    synchronize(); // the table is written anew for the next launch
}

void CudaSnapshots::copy(CUdeviceptr to, uint64_t from, uint64_t bytes) {
    driver_.check(driver_.cuMemcpyDtoDAsync(to, from, bytes, stream_), "cuMemcpyDtoDAsync");
}

void CudaSnapshots::synchronize() {
    driver_.check(driver_.cuStreamSynchronize(stream_), "cuStreamSynchronize");
}

// ---- Memory -------------------------------------------------------------------------------------

CUdeviceptr CudaSnapshots::allocate(uint64_t bytes) {
    {
        std::lock_guard lock(left_mutex_);
        left_.reserve(allocated_ + 1); // leaving the memory cannot fail
    }
    CUdeviceptr address = 0;
    const auto try_allocate = [&] {
        return stream_ordered_ ? driver_.cuMemAllocAsync(&address, bytes, stream_)
                               : driver_.cuMemAlloc(&address, bytes);
    };
    CUresult result = try_allocate();
    if (result == CUDA_ERROR_OUT_OF_MEMORY) {
        free_left(); // snapshots that have been moved may not have been freed yet
        result = try_allocate();
    }
    driver_.check(result, stream_ordered_ ? "cuMemAllocAsync" : "cuMemAlloc");
    ++allocated_;
    return address;
}

// Freeing takes its time, and cuMemFree waits for everything that the device is doing. The pump, on
// whose thread a save ends, must not wait for that, nor the completion: the copy threads free the
// memory.
void CudaSnapshots::leave(CUdeviceptr address) noexcept {
    {
        std::lock_guard lock(left_mutex_);
        left_.push_back(address);
    }
    try {
        copy_threads_.add([this] { free_left(); });
    } catch (const std::exception &) {
        free_left(); // there is no memory for a task
    }
}

void CudaSnapshots::free_left() noexcept {
    std::lock_guard freeing(freeing_mutex_);
    context_.clean_up([this](const CudaDriver &driver) {
        CUdeviceptr address;
        while (take_left(address)) {
            if (stream_ordered_) {
                driver.cuMemFreeAsync(address, stream_);
            } else {
                driver.cuMemFree(address);
            }
        }
        // The driver keeps memory that is freed in order until somebody synchronizes, and gives it
        // to the system then: better here than in the next decode step.
        if (stream_ordered_) driver.cuStreamSynchronize(stream_);
    });
}

bool CudaSnapshots::take_left(CUdeviceptr &address) {
    std::lock_guard lock(left_mutex_);
    if (left_.empty()) return false;
    address = left_.back();
    left_.pop_back();
    --allocated_;
    return true;
}

void CudaSnapshots::trim() noexcept {
    free_left();
    const std::unique_lock lock(taking_mutex_, std::try_to_lock);
    if (!lock) return; // a snapshot uses the table
    rows_.reset();
    pinned_bytes_ = 0;
}

} // namespace kvf
