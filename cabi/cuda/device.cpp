#include "cuda/device.h"

#include "core/json.h"

namespace kvf {
namespace {

constexpr uint64_t kStagingBytes = 32 << 20; // for each direction

} // namespace

CudaDevice::CudaDevice(JobOwner &owner, std::shared_ptr<const CudaContext> context, uint32_t index,
                       uint64_t staging_bytes, std::shared_ptr<CudaPinnedBudget> budget,
                       uint32_t copy_threads)
    : Device(index), context_(std::move(context)),
      staging_bytes_(staging_bytes ? staging_bytes : kStagingBytes), budget_(std::move(budget)),
      copy_threads_(copy_threads), ahead_(*context_, copy_threads_) {
    try {
        kernels_ = std::make_unique<CudaKernels>(*context_);
    } catch (const Error &error) {
        no_kernels_ = kvf::describe(error); // slower, and still right
    }
    const int max_pitch = context_->attribute(CU_DEVICE_ATTRIBUTE_MAX_PITCH);
    const CudaLane::Limits limits{staging_bytes_, static_cast<uint64_t>(max_pitch), *budget_};
    save_ = std::make_unique<CudaLane>(owner, *context_, kernels_.get(), copy_threads_, nullptr,
                                       index, Direction::Save, limits);
    load_ = std::make_unique<CudaLane>(owner, *context_, kernels_.get(), copy_threads_, &ahead_,
                                       index, Direction::Load, limits);
    snapshots_ = std::make_unique<CudaSnapshots>(*context_, kernels_.get(), copy_threads_);
}

CudaDevice::~CudaDevice() {
    stop();
    copy_threads_.stop(); // they have freed what snapshots left
}

void CudaDevice::check_usable() {
    if (context_->lost()) {
        throw Error(KVF_ERR_DEVICE_LOST, "an earlier transfer found it lost");
    }
    const CudaCurrent current(*context_);
    const CudaDriver &driver = context_->driver();
    // Tells what has gone wrong anywhere in the context.
    const CUresult result = driver.cuStreamQuery(snapshots_->stream());
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
               static_cast<unsigned long long>(pinned_bytes()),
               context_->lost() ? "true" : "false") +
           "\"kernels\": " + (kernels_ ? "true" : "false") +
           ", \"no_kernels\": " + json_quote(no_kernels_) +
           ", \"background_pace\": {\"save\": " + save_->describe_pace() +
           ", \"load\": " + load_->describe_pace() + "}}";
}

// Host memory that is pinned for the device's own use.
uint64_t CudaDevice::pinned_bytes() const {
    return save_->pinned_bytes() + load_->pinned_bytes() + snapshots_->pinned_bytes() +
           ahead_.pinned_bytes();
}

void CudaDevice::cut_short_stopping() {
    save_->cut_short_stopping();
    load_->cut_short_stopping();
}

// Kernels place the bytes. Without kernels nothing is loaded ahead.
std::shared_ptr<LoadAhead> CudaDevice::make_load_ahead(const std::vector<BufferPart> &parts) {
    if (!kernels_) return nullptr;
    auto load_ahead =
        std::make_shared<CudaLoadAhead>(*context_, *kernels_, ahead_, copy_threads_, parts);
    return load_ahead->has_memory() ? load_ahead : nullptr;
}

void CudaDevice::trim() {
    save_->trim();
    load_->trim();
    ahead_.trim();
    snapshots_->trim();
}

void CudaDevice::stop() {
    save_->stop();
    load_->stop();
}

} // namespace kvf
