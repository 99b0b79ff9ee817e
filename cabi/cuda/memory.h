// Device memory and pinned host memory that the library takes for itself.
#pragma once

#include <cstdint>

#include "cuda/context.h"

namespace kvf {

// Device memory, which is freed at the end. Freeing waits for everything that the device is doing.
class CudaDeviceMemory {
public:
    static constexpr uint64_t kGrain = 2 << 20; // drivers hand out device memory in units of this

    CudaDeviceMemory() = default; // none
    // Throws KVF_ERR_OUT_OF_MEMORY where the device has no more.
    CudaDeviceMemory(const CudaContext &context, uint64_t bytes);
    ~CudaDeviceMemory();
    CudaDeviceMemory(CudaDeviceMemory &&other) noexcept;
    CudaDeviceMemory &operator=(CudaDeviceMemory &&other) noexcept;

    explicit operator bool() const { return address_ != 0; }
    CUdeviceptr address() const { return address_; }
    uint64_t bytes() const { return bytes_; }

private:
    const CudaContext *context_ = nullptr;
    CUdeviceptr address_ = 0;
    uint64_t bytes_ = 0;
};

// Host memory that the copy engines of all devices reach, which is freed at the end.
class CudaPinnedMemory {
public:
    // Throws KVF_ERR_OUT_OF_MEMORY where the driver has no more.
    CudaPinnedMemory(const CudaContext &context, uint64_t bytes);
    ~CudaPinnedMemory();
    CudaPinnedMemory(const CudaPinnedMemory &) = delete;
    CudaPinnedMemory &operator=(const CudaPinnedMemory &) = delete;

    unsigned char *data() const { return static_cast<unsigned char *>(data_); }
    uint64_t bytes() const { return bytes_; }
    uint64_t pinned_bytes() const { return bytes_; }

private:
    const CudaContext &context_;
    void *data_ = nullptr;
    const uint64_t bytes_;
};

} // namespace kvf
