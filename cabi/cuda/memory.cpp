#include "cuda/memory.h"

#include <utility>

namespace kvf {

CudaDeviceMemory::CudaDeviceMemory(const CudaContext &context, uint64_t bytes)
    : context_(&context), bytes_(bytes) {
    const CudaCurrent current(context);
    context.driver().check(context.driver().cuMemAlloc(&address_, bytes), "cuMemAlloc");
}

CudaDeviceMemory::~CudaDeviceMemory() {
    if (!address_) return;
    context_->clean_up([this](const CudaDriver &driver) { driver.cuMemFree(address_); });
}

CudaDeviceMemory::CudaDeviceMemory(CudaDeviceMemory &&other) noexcept
    : context_(other.context_), address_(std::exchange(other.address_, 0)),
      bytes_(std::exchange(other.bytes_, 0)) {}

CudaDeviceMemory &CudaDeviceMemory::operator=(CudaDeviceMemory &&other) noexcept {
    std::swap(context_, other.context_);
    std::swap(address_, other.address_);
    std::swap(bytes_, other.bytes_);
    return *this;
}

CudaPinnedMemory::CudaPinnedMemory(const CudaContext &context, uint64_t bytes)
    : context_(context), bytes_(bytes) {
    const CudaCurrent current(context);
    const CudaDriver &driver = context.driver();
    driver.check(driver.cuMemHostAlloc(&data_, bytes, CU_MEMHOSTALLOC_PORTABLE), "cuMemHostAlloc");
}

CudaPinnedMemory::~CudaPinnedMemory() {
    context_.clean_up([this](const CudaDriver &driver) { driver.cuMemFreeHost(data_); });
}

} // namespace kvf
