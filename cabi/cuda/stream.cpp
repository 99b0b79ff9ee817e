#include "cuda/stream.h"

#include <algorithm>
#include <optional>

namespace kvf {
namespace {

constexpr size_t kWords = 1024; // waits outstanding at once

bool is_default(CUstream stream) {
    return !stream || stream == CU_STREAM_LEGACY || stream == CU_STREAM_PER_THREAD;
}

// What a stream is given while it is captured into a graph has not been submitted: an event there counts as passed, and
// to ask about it breaks the capture. So does an event on a default stream that would have to wait for such a stream.
// Throws KVF_ERR_INVALID_ARGUMENT for either, and has broken nothing then.
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

// An event behind what a stream holds.
class StreamEvent {
public:
    // Throws KVF_ERR_DEVICE where the context does not know the stream, and as check_not_captured() does.
    StreamEvent(std::shared_ptr<const CudaContext> context, CUstream stream)
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
    ~StreamEvent() {
        try {
            const CudaCurrent current(*context_);
            context_->driver().cuEventDestroy(event_);
        } catch (const Error &) {
            // The context is gone, and the event with it.
        }
    }
    StreamEvent(const StreamEvent &) = delete;
    StreamEvent &operator=(const StreamEvent &) = delete;

    const CudaContext &context() const { return *context_; }

    // Puts it behind what the stream holds by now. The context is current.
    void record_again(CUstream stream) {
        const CudaDriver &driver = context_->driver();
        driver.check(driver.cuEventRecord(event_, stream), "cuEventRecord");
    }

    // True also where nobody can tell any more: whatever uses the context will meet the error and say so.
    bool has_passed() const {
        try {
            const CudaCurrent current(*context_);
            return context_->driver().cuEventQuery(event_) != CUDA_ERROR_NOT_READY;
        } catch (const Error &) {
            return true;
        }
    }

    void wait() const {
        try {
            const CudaCurrent current(*context_);
            context_->driver().cuEventSynchronize(event_);
        } catch (const Error &) {
            // As above.
        }
    }

private:
    const std::shared_ptr<const CudaContext> context_;
    CUevent event_ = nullptr;
};

using StreamEvents = std::vector<std::unique_ptr<StreamEvent>>;

// The contexts whose default streams are meant.
CudaContexts contexts_meant(const CudaContexts &contexts, DeviceSet moved) {
    CUcontext callers = nullptr;
    contexts[0]->driver().cuCtxGetCurrent(&callers);
    CudaContexts meant;
    bool any_is_callers = false;
    for (size_t i = 0; i < contexts.size(); ++i) {
        const bool is_callers = contexts[i]->handle() == callers;
        any_is_callers |= is_callers;
        if (is_callers || moved & device_set(static_cast<uint32_t>(i + 1))) {
            meant.push_back(contexts[i]);
        }
    }
    return any_is_callers ? meant : contexts;
}

// Behind what a stream holds now: one event, or one for each context whose default stream is meant.
StreamEvents record_events(const CudaContexts &contexts, CUstream stream, DeviceSet moved) {
    StreamEvents events;
    if (is_default(stream)) {
        for (auto &context : contexts_meant(contexts, moved)) {
            events.push_back(std::make_unique<StreamEvent>(std::move(context), stream));
        }
        return events;
    }
    std::optional<Error> lost;
    for (const auto &context : contexts) {
        try {
            events.push_back(std::make_unique<StreamEvent>(context, stream));
            return events;
        } catch (const Error &error) {
            if (error.status == KVF_ERR_DEVICE_LOST) {
                lost = error; // the stream may be another's
            } else if (error.status != KVF_ERR_DEVICE) {
                throw; // a stream of another device is refused as such
            }
        }
    }
    if (lost) throw *lost;
    throw Error(KVF_ERR_INVALID_ARGUMENT, "no device of the engine knows this stream");
}

class StreamGate final : public Gate {
public:
    explicit StreamGate(StreamEvents events) : events_(std::move(events)) {}

private:
    bool is_done() override {
        return std::all_of(events_.begin(), events_.end(),
                           [](const auto &event) { return event->has_passed(); });
    }

    const StreamEvents events_;
};

} // namespace

std::shared_ptr<Gate> follow_stream(const CudaContexts &contexts, uint64_t stream,
                                    DeviceSet moved) {
    return std::make_shared<StreamGate>(
        record_events(contexts, reinterpret_cast<CUstream>(stream), moved));
}

struct CudaStreamWaits::Wait {
    size_t word;
    std::unique_ptr<StreamEvent> passed;
};

CudaStreamWaits::CudaStreamWaits(CudaContexts contexts) : contexts_(std::move(contexts)) {}

void CudaStreamWaits::map_words() {
    const CudaContext &context = usable(contexts_);
    const CudaDriver &driver = context.driver();
    const CudaCurrent current(context);
    void *memory;
    driver.check(driver.cuMemHostAlloc(&memory, kWords * sizeof(uint32_t),
                                       CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP),
                 "cuMemHostAlloc");
    const CUresult result = driver.cuMemHostGetDevicePointer(&device_words_, memory, 0);
    if (result != CUDA_SUCCESS) {
        driver.cuMemFreeHost(memory);
        driver.check(result, "cuMemHostGetDevicePointer");
    }
    words_ = new (memory) std::atomic<uint32_t>[kWords] {};
    for (size_t word = kWords; word-- > 0;) free_.push_back(word);
}

// Takes back the words of waits that are over.
void CudaStreamWaits::collect() {
    waits_.remove_if([this](const Wait &wait) {
        // The stream of a device that was given up may never pass.
        if (wait.passed->context().given_up() || !wait.passed->has_passed()) return false;
        free_.push_back(wait.word);
        return true;
    });
}

void CudaStreamWaits::make_wait(uint64_t stream, Job &job) {
    const CudaDriver &driver = contexts_[0]->driver();
    if (!driver.cuStreamWaitValue32) {
        throw Error(KVF_ERR_UNSUPPORTED, "the CUDA driver is older than 11.7");
    }
    const auto handle = reinterpret_cast<CUstream>(stream);
    std::lock_guard lock(mutex_);
    if (!words_) map_words();
    collect();
    // They tell whose the stream is, before it is made to wait: a driver takes a wait for a stream of another
    // context than the current one.
    StreamEvents events = record_events(contexts_, handle, job.devices());
    if (free_.size() < events.size()) throw Error(KVF_ERR_BUSY, "too many streams wait for jobs");
    std::list<Wait> placed;
    std::vector<std::atomic<uint32_t> *> words;
    words.reserve(events.size());
    try {
        for (auto &event : events) {
            const size_t word = free_.back();
            const CUdeviceptr address = device_words_ + word * sizeof(uint32_t);
            const CudaCurrent current(event->context());
            placed.push_back({word, std::move(event)});
            words.push_back(&words_[word]);
            words_[word].store(0);
            const CUresult result =
                driver.cuStreamWaitValue32(handle, address, 1, CU_STREAM_WAIT_VALUE_EQ);
            if (result != CUDA_SUCCESS) {
                placed.pop_back();
                driver.check(result, "cuStreamWaitValue32");
            }
            free_.pop_back();
            try {
                placed.back().passed->record_again(handle);
            } catch (...) {
                placed
                    .pop_back(); // nobody will know when the stream has passed: the word is not used again
                throw;
            }
        }
        job.signal_at_end(words);
    } catch (...) {
        // What waits already goes on.
        for (auto *word : words) word->store(1, std::memory_order_release);
        waits_.splice(waits_.end(), placed);
        throw;
    }
    waits_.splice(waits_.end(), placed);
}

CudaStreamWaits::~CudaStreamWaits() {
    if (!words_) return;
    bool watched = false; // by a stream that may never pass
    for (const Wait &wait : waits_) {
        if (wait.passed->context().given_up()) {
            watched = true;
        } else {
            wait.passed->wait();
        }
    }
    waits_.clear();
    try {
        if (watched) return;
        const CudaContext &context = usable(contexts_);
        const CudaCurrent current(context);
        context.driver().cuMemFreeHost(words_);
    } catch (const Error &) {
        // The context is gone, and everything in it.
    }
}

} // namespace kvf
