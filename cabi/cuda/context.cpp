#include "cuda/context.h"

#include "core/status.h"

namespace kvf {

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

uint64_t stuck_ns() {
    static const uint64_t value = seconds_from_environment("KVFERRY_STUCK_SECONDS", 60'000'000'000);
    return value;
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

} // namespace kvf
