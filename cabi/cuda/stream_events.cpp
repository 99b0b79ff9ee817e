#include "cuda/stream_events.h"

#include <algorithm>
#include <exception>

namespace kvf {
namespace {

bool is_default(CUstream stream) {
    return !stream || stream == CU_STREAM_LEGACY || stream == CU_STREAM_PER_THREAD;
}

// Throws KVF_ERR_INVALID_ARGUMENT for a stream that is being captured into a graph: what it is
// given has not been submitted, so that an event there counts as passed, and to ask about the event
// would break the capture. So would an event on a default stream that has to wait for such a
// stream. This function breaks no capture.
void check_not_captured(const CudaDriver &driver, CUstream stream) {
    CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
    const CUresult result = driver.cuStreamIsCapturing(stream, &status);
    if (result == CUDA_ERROR_STREAM_CAPTURE_IMPLICIT) {
        throw Error(
            KVF_ERR_INVALID_ARGUMENT,
            "a stream that the default stream waits for is being captured into a CUDA graph");
    }
    driver.check(result, "cuStreamIsCapturing");
    if (status == CU_STREAM_CAPTURE_STATUS_NONE) return;
    throw Error(
        KVF_ERR_INVALID_ARGUMENT,
        "the stream is being captured into a CUDA graph: what it is given does not run now");
}

// The contexts in which a default stream gets an event: record_events() tells which.
CudaContexts contexts_of_default_stream(const CudaContexts &contexts, DeviceSet moved) {
    CUcontext current = nullptr;
    contexts[0]->driver().cuCtxGetCurrent(&current);
    CudaContexts chosen;
    bool any_is_current = false;
    for (size_t i = 0; i < contexts.size(); ++i) {
        const bool is_current = contexts[i]->handle() == current;
        any_is_current |= is_current;
        if (is_current || moved & device_set(static_cast<uint32_t>(i + 1))) {
            chosen.push_back(contexts[i]);
        }
    }
    return any_is_current ? chosen : contexts;
}

class StreamGate final : public Gate {
public:
    explicit StreamGate(CudaStreamEvents events) : events_(std::move(events)) {}

private:
    bool is_done() override {
        return std::all_of(events_.begin(), events_.end(),
                           [](const auto &event) { return event->has_passed(); });
    }

    const CudaStreamEvents events_;
};

} // namespace

CudaStreamEvent::CudaStreamEvent(std::shared_ptr<const CudaContext> context, CUstream stream)
    : context_(std::move(context)) {
    const CudaDriver &driver = context_->driver();
    const CudaCurrent current(*context_);
    check_not_captured(driver, stream);
    driver.check(driver.cuEventCreate(&event_, CU_EVENT_DISABLE_TIMING), "cuEventCreate");
    const CUresult result = driver.cuEventRecord(event_, stream);
    if (result != CUDA_SUCCESS) {
        driver.cuEventDestroy(event_);
        driver.check(result, "cuEventRecord");
    }
}

CudaStreamEvent::~CudaStreamEvent() {
    context_->clean_up([this](const CudaDriver &driver) { driver.cuEventDestroy(event_); });
}

void CudaStreamEvent::record_again(CUstream stream) {
    const CudaDriver &driver = context_->driver();
    driver.check(driver.cuEventRecord(event_, stream), "cuEventRecord");
}

bool CudaStreamEvent::has_passed() const {
    try {
        const CudaCurrent current(*context_);
        return context_->driver().cuEventQuery(event_) != CUDA_ERROR_NOT_READY;
    } catch (const Error &) {
        return true;
    }
}

void CudaStreamEvent::wait() const {
    try {
        const CudaCurrent current(*context_);
        context_->driver().cuEventSynchronize(event_);
    } catch (const Error &) {
        // The context is gone: there is nothing to wait for.
    }
}

CudaStreamEvents record_events(const CudaContexts &contexts, CUstream stream, DeviceSet moved) {
    CudaStreamEvents events;
    if (is_default(stream)) {
        for (auto &context : contexts_of_default_stream(contexts, moved)) {
            events.push_back(std::make_unique<CudaStreamEvent>(std::move(context), stream));
        }
        return events;
    }
    std::exception_ptr lost;
    for (const auto &context : contexts) {
        try {
            events.push_back(std::make_unique<CudaStreamEvent>(context, stream));
            return events;
        } catch (const Error &error) {
            if (error.status == KVF_ERR_DEVICE_LOST) {
                lost = std::current_exception(); // the stream may be of another device
            } else if (error.status != KVF_ERR_DEVICE) {
                throw; // a context refuses a stream of another device with KVF_ERR_DEVICE
            }
        }
    }
    if (lost) std::rethrow_exception(lost);
    throw Error(KVF_ERR_INVALID_ARGUMENT, "no device of the engine knows this stream");
}

std::shared_ptr<Gate> follow_stream(const CudaContexts &contexts, uint64_t stream,
                                    DeviceSet moved) {
    return std::make_shared<StreamGate>(
        record_events(contexts, reinterpret_cast<CUstream>(stream), moved));
}

} // namespace kvf
