#include "cuda/driver.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <mutex>

#include "core/fork.h"

namespace kvf {
namespace {

// The oldest driver that the entry points and the kernels' PTX (ISA 6.0, CUDA 9.0) are sure to work on;
// primary contexts, pointer attributes and registered memory of today's semantics are all in it.
constexpr int kOldestVersion = 11000;

// The driver does not survive a fork: a child of a process that has begun to open it cannot use it.
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
    touched = true; // the loader's locks too do not survive a fork in the middle
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
    return driver; // its library stays loaded
}

} // namespace

std::shared_ptr<const CudaDriver> CudaDriver::get(std::string &why) {
    // Before anything that a fork could interrupt; twice does no harm. (A function's static object would not do: a child
    // would wait for ever for the thread that was making it.)
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
    char detail[256]; // no memory is taken for it, so that the status is told whatever happens
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

namespace {

// Host memory that is still registered with the driver because a device was given up. Its owner may have unmapped it:
// what is mapped there later is not what the driver has pinned.
class LeftBehind {
public:
    void add(const void *memory, uint64_t bytes) {
        std::lock_guard lock(mutex_);
        const auto begin = reinterpret_cast<uint64_t>(memory);
        ranges_.emplace_back(begin, begin + bytes);
    }
    bool meets(const void *memory, uint64_t bytes) {
        std::lock_guard lock(mutex_);
        const auto begin = reinterpret_cast<uint64_t>(memory);
        return std::any_of(ranges_.begin(), ranges_.end(), [&](const auto &range) {
            return begin < range.second && range.first < begin + bytes;
        });
    }

private:
    std::mutex mutex_;
    std::vector<std::pair<uint64_t, uint64_t>> ranges_; // begin, end
};

// Of the process: engines that are made later meet it, too.
LeftBehind &left_behind() {
    static auto *instance =
        new LeftBehind; // never destroyed, as threads may outlive static destructors
    return *instance;
}

} // namespace

CudaContext::CudaContext(std::shared_ptr<const CudaDriver> driver, int ordinal)
    : driver_(std::move(driver)), ordinal_(ordinal) {
    const CudaRelaxed relaxed(*driver_);
    driver_->check(driver_->cuDeviceGet(&device_, ordinal), "cuDeviceGet");
    driver_->check(driver_->cuDevicePrimaryCtxRetain(&context_, device_),
                   "cuDevicePrimaryCtxRetain");
}

CudaContext::~CudaContext() {
    if (given_up()) return;
    const CudaRelaxed relaxed(*driver_);
    driver_->cuDevicePrimaryCtxRelease(device_);
}

int CudaContext::attribute(CUdevice_attribute attribute) const {
    int value = 0;
    driver_->cuDeviceGetAttribute(&value, attribute, device_);
    return value;
}

std::string CudaContext::name() const {
    char name[128] = "";
    driver_->cuDeviceGetName(name, sizeof name, device_);
    return name;
}

std::string CudaContext::pci_bus_id() const {
    char id[32] = "";
    driver_->cuDeviceGetPCIBusId(id, sizeof id, device_);
    return id;
}

uint64_t CudaContext::total_memory() const {
    size_t bytes = 0;
    driver_->cuDeviceTotalMem(&bytes, device_);
    return bytes;
}

void CudaContext::adopt_thread() const {
    driver_->check(driver_->cuCtxSetCurrent(context_), "cuCtxSetCurrent");
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    driver_->cuThreadExchangeStreamCaptureMode(&mode);
}

CudaRelaxed::CudaRelaxed(const CudaDriver &driver)
    : driver_(driver),
      exchanged_(driver.cuThreadExchangeStreamCaptureMode(&mode_) == CUDA_SUCCESS) {}

CudaRelaxed::~CudaRelaxed() {
    if (exchanged_) driver_.cuThreadExchangeStreamCaptureMode(&mode_);
}

CudaCurrent::CudaCurrent(const CudaContext &context)
    : driver_(context.driver()), relaxed_(driver_) {
    if (context.given_up()) throw Error(KVF_ERR_DEVICE_LOST, "a copy did not end");
    driver_.check(driver_.cuCtxPushCurrent(context.handle()), "cuCtxPushCurrent");
}

CudaCurrent::~CudaCurrent() {
    CUcontext popped;
    driver_.cuCtxPopCurrent(&popped);
}

const CudaContext &usable(const CudaContexts &contexts) {
    const CudaContext *best = nullptr;
    for (const auto &context : contexts) {
        if (context->given_up()) continue;
        if (!context->lost()) return *context;
        if (!best) best = context.get();
    }
    if (!best) throw Error(KVF_ERR_DEVICE_LOST, "a copy did not end");
    return *best;
}

void CudaPinner::pin(void *memory, uint64_t bytes) {
    const CudaContext &context = usable(contexts_);
    const CudaCurrent current(context);
    const CudaDriver &driver = context.driver();
    driver.check(driver.cuMemHostRegister(memory, bytes, CU_MEMHOSTREGISTER_PORTABLE),
                 "cuMemHostRegister");
}

bool CudaPinner::unpin(void *memory, uint64_t bytes) noexcept {
    const bool given_up = std::any_of(contexts_.begin(), contexts_.end(),
                                      [](const auto &context) { return context->given_up(); });
    try {
        if (given_up) {
            left_behind().add(memory, bytes);
            return false;
        }
        const CudaContext &context = usable(contexts_);
        const CudaCurrent current(context);
        context.driver().cuMemHostUnregister(memory);
    } catch (...) {
        // The context is gone, and the registration with it.
    }
    return !given_up;
}

bool CudaPinner::is_pinned(const void *memory, uint64_t bytes) const {
    if (left_behind().meets(memory, bytes)) return false;
    const CudaContext &context = usable(contexts_);
    const CudaDriver &driver = context.driver();
    struct Range {
        bool pinned;
        uint64_t end; // 0: the driver does not tell
    };
    const auto range_of = [&](uint64_t address) -> Range {
        unsigned int type = 0;
        CUdeviceptr begin = 0;
        size_t size = 0;
        CUpointer_attribute attributes[] = {CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
                                            CU_POINTER_ATTRIBUTE_RANGE_START_ADDR,
                                            CU_POINTER_ATTRIBUTE_RANGE_SIZE};
        void *values[] = {&type, &begin, &size};
        const CUresult result = driver.cuPointerGetAttributes(3, attributes, values, address);
        if (result != CUDA_SUCCESS || type != CU_MEMORYTYPE_HOST) return {false, 0};
        const bool inside = begin <= address && address - begin < size;
        return {true, inside ? begin + size : 0};
    };
    const CudaCurrent current(context);
    const uint64_t begin = reinterpret_cast<uint64_t>(memory), end = begin + bytes;
    const Range range = range_of(begin);
    if (!range.pinned) return false;
    if (range.end == 0) return range_of(end - 1).pinned; // as well as one can tell
    // Neighbouring ranges do not count: a copy across two registrations is refused (seen on driver 580).
    return range.end >= end;
}

uint64_t stuck_ns() {
    static const uint64_t value = seconds_from_environment("KVFERRY_STUCK_SECONDS", 60'000'000'000);
    return value;
}

} // namespace kvf
