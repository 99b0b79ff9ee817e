#include "cuda/driver.h"

#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <mutex>

#include "core/fork.h"

namespace kvf {
namespace {

// The oldest driver on which the entry points and the kernels' PTX (ISA 6.0, CUDA 9.0) are sure to
// work: primary contexts, pointer attributes and registered memory have their present meaning
// there.
constexpr int kOldestVersion = 11000;

// A driver does not survive a fork: the child of a process that has begun to open the driver cannot
// use it.
std::atomic<bool> touched{false};
std::atomic<bool> inherited{false};
std::atomic<bool> watching_forks{false};

struct Opened {
    std::shared_ptr<const CudaDriver> driver;
    std::string why;
};
constinit std::mutex opening;
constinit const Opened *opened = nullptr; // never destroyed: threads may outlive static destructors

std::shared_ptr<const CudaDriver> open_driver(std::string &why) {
    const char *name = std::getenv("KVFERRY_CUDA_DRIVER");
    if (!name || !*name) name = "libcuda.so.1";
    touched = true; // now, since a fork in the middle of dlopen() leaves the loader's locks taken
                    // in the child
    void *library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        touched = false;
        why = std::string("no CUDA driver: ") + dlerror();
        return nullptr;
    }
    auto driver = std::make_shared<CudaDriver>();
    const char *missing = nullptr;
#define KVF_CUDA_LOAD(member, symbol, parameters)                                                  \
    driver->member = reinterpret_cast<decltype(driver->member)>(dlsym(library, #symbol));
    CUDA_DRIVER_ENTRY_POINTS(KVF_CUDA_LOAD)
#undef KVF_CUDA_LOAD
#define KVF_CUDA_REQUIRE(member, symbol, parameters)                                               \
    if (!driver->member) missing = #symbol;
    CUDA_DRIVER_REQUIRED(KVF_CUDA_REQUIRE)
#undef KVF_CUDA_REQUIRE
    if (missing) {
        touched = false;
        why = std::string("the CUDA driver ") + name + " is too old: it has no " + missing;
        return nullptr;
    }
    try {
        driver->check(driver->cuInit(0), "cuInit");
        driver->check(driver->cuDriverGetVersion(&driver->version), "cuDriverGetVersion");
    } catch (const Error &error) {
        why = describe(error);
        return nullptr;
    }
    if (driver->version < kOldestVersion) {
        why = format("the CUDA driver is too old: it supports CUDA %d.%d, and 11.0 is needed",
                     driver->version / 1000, driver->version % 1000 / 10);
        return nullptr;
    }
    return driver; // the library stays loaded
}

} // namespace

std::shared_ptr<const CudaDriver> CudaDriver::get(std::string &why) {
    // Comes before everything that a fork could interrupt. Two threads may both come here, which
    // does no harm. (With a static object of this function instead, a child would wait for ever for
    // the thread that was making the object.)
    if (!watching_forks) {
        on_fork([] {}, [] {},
                [] {
                    new (&opening) std::mutex; // a thread that the child does not have may hold it
                    inherited = touched.load();
                });
        watching_forks = true;
    }
    if (inherited) {
        why = "the CUDA driver cannot be used in a forked child of a process that used it";
        return nullptr;
    }
    std::lock_guard lock(opening);
    if (!opened) {
        auto made = std::make_unique<Opened>();
        made->driver = open_driver(made->why);
        opened = made.release();
    }
    why = opened->why;
    return opened->driver;
}

Error CudaDriver::error(CUresult result, const char *call) const {
    const char *name = nullptr;
    const char *text = nullptr;
    cuGetErrorName(result, &name);
    cuGetErrorString(result, &text);
    char detail[256]; // allocates nothing, so that the status is told whatever happens
    std::snprintf(detail, sizeof detail, "%s: %s (%s)", call, name ? name : "unknown error",
                  text ? text : "");
    switch (result) {
    case CUDA_ERROR_OUT_OF_MEMORY: return Error(KVF_ERR_OUT_OF_MEMORY, detail);
    case CUDA_ERROR_DEINITIALIZED:
    case CUDA_ERROR_ECC_UNCORRECTABLE:
    case CUDA_ERROR_NVLINK_UNCORRECTABLE:
    case CUDA_ERROR_CONTAINED:
    case CUDA_ERROR_ILLEGAL_ADDRESS:
    case CUDA_ERROR_LAUNCH_TIMEOUT:
    case CUDA_ERROR_CONTEXT_IS_DESTROYED:
    case CUDA_ERROR_ASSERT:
    case CUDA_ERROR_HARDWARE_STACK_ERROR:
    case CUDA_ERROR_ILLEGAL_INSTRUCTION:
    case CUDA_ERROR_MISALIGNED_ADDRESS:
    case CUDA_ERROR_INVALID_ADDRESS_SPACE:
    case CUDA_ERROR_INVALID_PC:
    case CUDA_ERROR_LAUNCH_FAILED:
    case CUDA_ERROR_EXTERNAL_DEVICE:
    case CUDA_ERROR_UNKNOWN: return Error(KVF_ERR_DEVICE_LOST, detail);
    default: return Error(KVF_ERR_DEVICE, detail);
    }
}

void CudaDriver::check(CUresult result, const char *call) const {
    if (result != CUDA_SUCCESS) throw error(result, call);
}

} // namespace kvf
