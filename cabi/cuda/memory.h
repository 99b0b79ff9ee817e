// Device memory and pinned host memory that the library allocates for its own use.
#pragma once

#include <cstdint>

#include "cuda/context.h"

namespace kvf {

// Device memory. The destructor frees it, which waits for everything that the device is doing.
class CudaDeviceMemory {
public:
    static constexpr uint64_t kGrain = 2 << 20; // drivers hand out device memory in units of this

    CudaDeviceMemory() = default; // none
    // Throws KVF_ERR_OUT_OF_MEMORY if the device has too little left.
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

// Host memory that the copy engines of all devices reach. The destructor frees it.
class CudaPinnedMemory {
public:
    // Throws KVF_ERR_OUT_OF_MEMORY if the driver has too little left.
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
