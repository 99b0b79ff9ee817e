// The CUDA driver, opened at run time: libkvferry serves machines with and without a GPU.
#pragma once

#include <memory>
#include <string>

#include "core/status.h"
#include "cuda/driver_api.h"

namespace kvf {

class CudaDriver {
public:
    // Opens the driver that the environment variable KVFERRY_CUDA_DRIVER names, or libcuda.so.1,
    // once for the process. Returns NULL, and the reason in `why`, if no driver can be used.
    static std::shared_ptr<const CudaDriver> get(std::string &why);

#define KVF_CUDA_MEMBER(name, symbol, parameters) CUresult(*name) parameters = nullptr;
    CUDA_DRIVER_ENTRY_POINTS(KVF_CUDA_MEMBER)
#undef KVF_CUDA_MEMBER

    int version = 0; // of the CUDA that the driver supports: 1000 * major + 10 * minor

    // Throws for a result that is an error: KVF_ERR_OUT_OF_MEMORY, KVF_ERR_DEVICE_LOST for an error
    // that no later call recovers from, or KVF_ERR_DEVICE.
    void check(CUresult result, const char *call) const;
    // The error that check() throws. `call` is the name of the function that returned the result.
    Error error(CUresult result, const char *call) const;
};

} // namespace kvf
