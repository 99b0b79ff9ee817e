#include "cuda/device.h"

#include "core/json.h"
#include "memory/layout_builder.h"

namespace kvf {
namespace {

constexpr uint64_t kStagingBytes = 32 << 20; // for a direction
constexpr uint32_t kSnapshotBlocks = 128;    // the device does nothing else meanwhile

} // namespace

// Device memory that holds a layout's bytes, one after another. Lives no longer than the device.
class CudaDevice::SnapshotMemory {
public:
    SnapshotMemory(CudaDevice &device, uint64_t bytes)
        : device_(device), address(device.allocate_snapshot(bytes)) {}
    ~SnapshotMemory() { device_.leave_snapshot(address); }
    SnapshotMemory(const SnapshotMemory &) = delete;
    SnapshotMemory &operator=(const SnapshotMemory &) = delete;

private:
    CudaDevice &device_;

public:
    const CUdeviceptr address;
};

CudaDevice::CudaDevice(JobOwner &owner, std::shared_ptr<const CudaContext> context, uint32_t index,
                       uint64_t staging_bytes, uint32_t copy_threads)
    : Device(index), context_(std::move(context)),
      staging_bytes_(staging_bytes ? staging_bytes : kStagingBytes), crew_(copy_threads) {
    try {
        kernels_ = std::make_unique<CudaKernels>(*context_);
    } catch (const Error &error) {
        no_kernels_ = kvf::describe(error); // slower, and right all the same
    }
    if (kernels_) landings_ = std::make_unique<CudaLandings>(*context_, *kernels_, crew_);
    const int max_pitch = context_->attribute(CU_DEVICE_ATTRIBUTE_MAX_PITCH);
    const CudaLane::Limits limits{staging_bytes_, static_cast<uint64_t>(max_pitch)};
    save_ = std::make_unique<CudaLane>(owner, *context_, kernels_.get(), crew_, nullptr, index,
                                       Direction::Save, limits);
    load_ = std::make_unique<CudaLane>(owner, *context_, kernels_.get(), crew_, landings_.get(),
                                       index, Direction::Load, limits);
    const CudaCurrent current(*context_);
    const CudaDriver &driver = context_->driver();
    driver.check(driver.cuStreamCreateWithPriority(&snapshot_stream_, CU_STREAM_NON_BLOCKING, 0),
                 "cuStreamCreateWithPriority");
    stream_ordered_ = driver.cuMemAllocAsync && driver.cuMemFreeAsync &&
                      context_->attribute(CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED);
}

CudaDevice::~CudaDevice() {
    stop();
    crew_.stop(); // it has freed what snapshots left
    try {
        const CudaCurrent current(*context_);
        if (snapshot_table_) context_->driver().cuMemFree(snapshot_table_);
        if (snapshot_stream_) context_->driver().cuStreamDestroy(snapshot_stream_);
    } catch (const Error &) {
        // The context is gone, and the stream with it.
    }
}

void CudaDevice::check_usable() {
    if (context_->lost()) {
        throw Error(KVF_ERR_DEVICE_LOST, "an earlier transfer found it lost");
    }
    const CudaCurrent current(*context_);
    const CudaDriver &driver = context_->driver();
    const CUresult result =
        driver.cuStreamQuery(snapshot_stream_); // tells what has gone wrong anywhere
    if (result != CUDA_ERROR_NOT_READY) driver.check(result, "cuStreamQuery");
}

std::string CudaDevice::describe() const {
    return "{\"kind\": \"cuda\", \"name\": " + json_quote(context_->name()) +
           ", \"pci_bus_id\": " + json_quote(context_->pci_bus_id()) +
           format(
               ", \"ordinal\": %d, \"compute_capability\": \"%d.%d\", \"memory\": %llu, "
               "\"copy_engines\": %d, \"staging\": %llu, \"pinned_bytes\": %llu, \"broken\": %s, ",
               context_->ordinal(),
               context_->attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
               context_->attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
               static_cast<unsigned long long>(context_->total_memory()),
               context_->attribute(CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT),
               static_cast<unsigned long long>(staging_bytes_),
               static_cast<unsigned long long>(save_->pinned_bytes() + load_->pinned_bytes() +
                                               snapshot_pinned_ +
                                               (landings_ ? landings_->pinned_bytes() : 0)),
               context_->lost() ? "true" : "false") +
           "\"kernels\": " + (kernels_ ? "true" : "false") +
           ", \"no_kernels\": " + json_quote(no_kernels_) +
           ", \"background_pace\": {\"save\": " + save_->describe_pace() +
           ", \"load\": " + load_->describe_pace() + "}}";
}

void CudaDevice::trim() {
    save_->trim();
    load_->trim();
    if (landings_) landings_->trim();
    free_snapshots();
    const std::unique_lock lock(snapshot_mutex_, std::try_to_lock);
    if (!lock) return; // a snapshot uses it
    try {
        const CudaCurrent current(*context_);
        snapshot_rows_.reset();
        if (snapshot_table_) context_->driver().cuMemFree(snapshot_table_);
        snapshot_table_ = 0;
        snapshot_pinned_ = 0;
    } catch (const Error &) {
        // The context is gone, and the memory with it.
    }
}

void CudaDevice::stop() {
    save_->stop();
    load_->stop();
}

CUdeviceptr CudaDevice::allocate_snapshot(uint64_t bytes) {
    const CudaDriver &driver = context_->driver();
    {
        std::lock_guard lock(left_mutex_);
        left_.reserve(snapshots_ + 1); // leaving it must not fail
    }
    CUdeviceptr address = 0;
    const auto allocate = [&] {
        return stream_ordered_ ? driver.cuMemAllocAsync(&address, bytes, snapshot_stream_)
                               : driver.cuMemAlloc(&address, bytes);
    };
    CUresult result = allocate();
    if (result == CUDA_ERROR_OUT_OF_MEMORY) {
        free_snapshots(); // what others have left may not have been freed yet
        result = allocate();
    }
    driver.check(result, stream_ordered_ ? "cuMemAllocAsync" : "cuMemAlloc");
    ++snapshots_;
    return address;
}

// Freeing takes its time, and cuMemFree waits for all that the device is doing: neither the completion nor the pump,
// whose thread this is, shall wait for it. The crew does it.
void CudaDevice::leave_snapshot(CUdeviceptr address) noexcept {
    {
        std::lock_guard lock(left_mutex_);
        left_.push_back(address);
    }
    try {
        crew_.add([this] { free_snapshots(); });
    } catch (const std::exception &) {
        free_snapshots(); // there is no memory for a task
    }
}

void CudaDevice::free_snapshots() noexcept {
    std::lock_guard freeing(freeing_mutex_);
    try {
        const CudaCurrent current(*context_);
        const CudaDriver &driver = context_->driver();
        for (;;) {
            CUdeviceptr address;
            {
                std::lock_guard lock(left_mutex_);
                if (left_.empty()) break;
                address = left_.back();
                left_.pop_back();
                --snapshots_;
            }
            if (stream_ordered_) {
                driver.cuMemFreeAsync(address, snapshot_stream_);
            } else {
                driver.cuMemFree(address);
            }
        }
        // The driver keeps what was freed in order until somebody synchronizes, and gives it back then: better here
        // than in the next decode step.
        if (stream_ordered_) driver.cuStreamSynchronize(snapshot_stream_);
    } catch (const Error &) {
        // The context is gone, and the memory with it.
    }
}

// Everything is packed into one allocation by copies on the device, which run at the speed of its
// memory; what remains is to move long runs of that.
Device::Snapshot CudaDevice::snapshot(const Layout &layout, unsigned char *) {
    std::lock_guard lock(snapshot_mutex_);
    const CudaCurrent current(*context_);
    const CudaDriver &driver = context_->driver();
    auto memory = std::make_shared<SnapshotMemory>(*this, layout.bytes);

    LayoutBuilder packed;
    uint64_t at = memory->address;
    const auto synchronize = [&] {
        driver.check(driver.cuStreamSynchronize(snapshot_stream_), "cuStreamSynchronize");
    };
    const uint64_t max_pitch =
        static_cast<uint64_t>(context_->attribute(CU_DEVICE_ATTRIBUTE_MAX_PITCH));
    try {
        for (const kvf_region &block : layout.blocks) {
            if (block.rows == 1 || block.pitch > max_pitch) {
                for (uint64_t i = 0; i < block.rows; ++i) {
                    driver.check(driver.cuMemcpyDtoDAsync(at + i * block.width,
                                                          block.address + i * block.pitch,
                                                          block.width, snapshot_stream_),
                                 "cuMemcpyDtoDAsync");
                }
            } else {
                CUDA_MEMCPY2D copy{};
                copy.srcMemoryType = copy.dstMemoryType = CU_MEMORYTYPE_DEVICE;
                copy.srcDevice = block.address;
                copy.srcPitch = block.pitch;
                copy.dstDevice = at;
                copy.dstPitch = block.width;
                copy.WidthInBytes = block.width;
                copy.Height = block.rows;
                driver.check(driver.cuMemcpy2DAsync(&copy, snapshot_stream_), "cuMemcpy2DAsync");
            }
            packed.add(
                {at, block.width, block.rows, block.width, block.offset, block.buffer_pitch});
            at += block.width * block.rows;
        }
        if (!layout.spans.empty() && kernels_ && !snapshot_rows_) {
            if (!snapshot_table_) {
                driver.check(driver.cuMemAlloc(&snapshot_table_, CudaRowTable::kBytes),
                             "cuMemAlloc");
            }
            snapshot_rows_ = std::make_unique<CudaRowTable>(*context_, snapshot_table_);
            snapshot_pinned_ = CudaRowTable::kBytes;
        }
        Cursor cursor(layout);
        cursor.skip_blocks();
        while (!cursor.at_end()) {
            // Offsets within one launch are 32 bits wide.
            const Piece piece = cursor.next(UINT32_MAX, CudaRowTable::kRows);
            if (kernels_) {
                snapshot_rows_->clear();
                snapshot_rows_->add(piece, 0);
                snapshot_rows_->send(snapshot_stream_);
                kernels_->launch(Direction::Save, at, snapshot_rows_->rows(), kSnapshotBlocks,
                                 snapshot_stream_);
                synchronize(); // the table is written anew for the next launch
            }
            for (uint64_t i = 0; i < piece.count; ++i) {
                const Run run = piece.run(i);
                if (!kernels_) {
                    driver.check(
                        driver.cuMemcpyDtoDAsync(at, run.address, run.bytes, snapshot_stream_),
                        "cuMemcpyDtoDAsync");
                }
                packed.add(at, run.offset, run.bytes);
                at += run.bytes;
            }
        }
    } catch (...) {
        driver.cuStreamSynchronize(snapshot_stream_); // what was queued must not outlive the memory
        throw;
    }
    synchronize();
    return {packed.finish(), std::move(memory)};
}

bool cuda_place(const CudaContext &context, uint64_t address, CudaPlace &place) {
    const CudaDriver &driver = context.driver();
    unsigned int type = 0, in_one_piece = 0;
    int ordinal = -1;
    CUdeviceptr begin = 0;
    size_t bytes = 0;
    CUpointer_attribute attributes[] = {
        CU_POINTER_ATTRIBUTE_MEMORY_TYPE, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
        CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, CU_POINTER_ATTRIBUTE_RANGE_SIZE,
        CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE};
    void *values[] = {&type, &ordinal, &begin, &bytes, &in_one_piece};
    const CudaCurrent current(context);
    // Unlike cuPointerGetAttribute, this one succeeds for any pointer, and gives zeros for a foreign one.
    // An error says that the device is lost, and not that the memory were the host's: whoever touched it
    // there would crash.
    driver.check(driver.cuPointerGetAttributes(5, attributes, values, address),
                 "cuPointerGetAttributes");
    if (type != CU_MEMORYTYPE_DEVICE || ordinal < 0) return false;
    if (begin == 0) {
        begin = address;
        bytes = 1;
    }
    place = {ordinal, begin, begin + bytes, in_one_piece != 0};
    return true;
}

} // namespace kvf
