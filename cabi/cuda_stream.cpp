#include "cuda_stream.h"

namespace kvf {
namespace {

constexpr size_t kWords = 1024; // waits outstanding at once

class StreamGate final : public Gate {
public:
    StreamGate(std::shared_ptr<const CudaContext> context, uint64_t stream)
        : context_(std::move(context)) {
        const CudaDriver &driver = context_->driver();
        const CudaCurrent current(*context_);
        driver.check(driver.cuEventCreate(&event_, CU_EVENT_DISABLE_TIMING), "cuEventCreate");
        const CUresult result = driver.cuEventRecord(event_, reinterpret_cast<CUstream>(stream));
        if (result != CUDA_SUCCESS) {
            driver.cuEventDestroy(event_);
            driver.check(result, "cuEventRecord");
        }
    }
    ~StreamGate() override {
        try {
            const CudaCurrent current(*context_);
            context_->driver().cuEventDestroy(event_);
        } catch (const Error &) {
            // The context is gone, and the event with it.
        }
    }

    bool is_open() override {
        // An error opens it too: the transfer will meet it and say so.
        if (!open_ && query() != CUDA_ERROR_NOT_READY) open_ = true;
        return open_;
    }

private:
    CUresult query() const {
        try {
            const CudaCurrent current(*context_);
            return context_->driver().cuEventQuery(event_);
        } catch (const Error &) {
            return CUDA_ERROR_CONTEXT_IS_DESTROYED;
        }
    }

    const std::shared_ptr<const CudaContext> context_;
    CUevent event_ = nullptr;
    std::atomic<bool> open_{false};
};

} // namespace

std::shared_ptr<Gate> follow_stream(const CudaContexts &contexts, uint64_t stream) {
    for (const auto &context : contexts) {
        try {
            return std::make_shared<StreamGate>(context, stream);
        } catch (const Error &error) {
            if (error.status != KVF_ERR_DEVICE)
                throw; // a stream of another device is refused as such
        }
    }
    throw Error(KVF_ERR_INVALID_ARGUMENT, "no device of the engine knows this stream");
}

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
    for (auto it = waits_.begin(); it != waits_.end();) {
        if (it->context->given_up()) { // its stream may never pass
            ++it;
            continue;
        }
        const CudaDriver &driver = it->context->driver();
        const CudaCurrent current(*it->context);
        if (driver.cuEventQuery(it->passed) == CUDA_ERROR_NOT_READY) {
            ++it;
            continue;
        }
        driver.cuEventDestroy(it->passed);
        free_.push_back(it->word);
        it = waits_.erase(it);
    }
}

void CudaStreamWaits::make_wait(uint64_t stream, Job &job) {
    if (!contexts_[0]->driver().cuStreamWaitValue32) {
        throw Error(KVF_ERR_UNSUPPORTED, "the CUDA driver is older than 11.7");
    }
    std::lock_guard lock(mutex_);
    if (!words_) map_words();
    collect();
    if (free_.empty()) throw Error(KVF_ERR_BUSY, "too many streams wait for jobs");
    const size_t word = free_.back();
    const CUdeviceptr address = device_words_ + word * sizeof(uint32_t);
    for (const auto &context : contexts_) {
        const CudaDriver &driver = context->driver();
        const CudaCurrent current(*context);
        const auto handle = reinterpret_cast<CUstream>(stream);
        Wait wait{word, nullptr, context.get()};
        driver.check(driver.cuEventCreate(&wait.passed, CU_EVENT_DISABLE_TIMING), "cuEventCreate");
        words_[word].store(0);
        CUresult result = driver.cuStreamWaitValue32(handle, address, 1, CU_STREAM_WAIT_VALUE_EQ);
        if (result == CUDA_SUCCESS) {
            free_.pop_back();
            job.raise_at_end(words_[word]);
            result = driver.cuEventRecord(wait.passed, handle);
            if (result == CUDA_SUCCESS) {
                waits_.push_back(wait);
                return;
            }
            // Nobody will know when the stream has passed: the word is not used again.
            driver.cuEventDestroy(wait.passed);
            driver.check(result, "cuEventRecord");
        }
        driver.cuEventDestroy(wait.passed);
        const Error error = driver.error(result, "cuStreamWaitValue32");
        if (error.status != KVF_ERR_DEVICE)
            throw error; // a stream of another device is refused as such
    }
    throw Error(KVF_ERR_INVALID_ARGUMENT, "no device of the engine knows this stream");
}

CudaStreamWaits::~CudaStreamWaits() {
    if (!words_) return;
    try {
        bool watched = false; // by a stream that may never pass
        for (const Wait &wait : waits_) {
            if (wait.context->given_up()) {
                watched = true;
                continue;
            }
            const CudaCurrent current(*wait.context);
            const CudaDriver &driver = wait.context->driver();
            driver.cuEventSynchronize(wait.passed);
            driver.cuEventDestroy(wait.passed);
        }
        if (watched) return;
        const CudaContext &context = usable(contexts_);
        const CudaCurrent current(context);
        context.driver().cuMemFreeHost(words_);
    } catch (const Error &) {
        // The context is gone, and everything in it.
    }
}

} // namespace kvf
