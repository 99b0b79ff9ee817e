#include "cuda/stream_waits.h"

#include <algorithm>
#include <new>

namespace kvf {
namespace {

constexpr size_t kWords = 1024; // waits outstanding at once

} // namespace

struct CudaStreamWaits::Wait {
    size_t word;
    std::unique_ptr<CudaStreamEvent> passed; // behind the wait
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

// Frees the words of waits that are over.
void CudaStreamWaits::collect_passed() {
    waits_.remove_if([this](const Wait &wait) {
        // The stream of a device that was given up may never pass.
        if (wait.passed->context().given_up() || !wait.passed->has_passed()) return false;
        free_.push_back(wait.word);
        return true;
    });
}

void CudaStreamWaits::make_wait(uint64_t stream, Job &job) {
    if (!contexts_[0]->driver().cuStreamWaitValue32) {
        throw Error(KVF_ERR_UNSUPPORTED, "the CUDA driver is older than 11.7");
    }
    const auto handle = reinterpret_cast<CUstream>(stream);
    std::lock_guard lock(mutex_);
    if (!words_) map_words();
    collect_passed();
    // The events tell in which context the stream is, before it is made to wait: a driver accepts a
    // wait for a stream of another context than the current one.
    CudaStreamEvents events = record_events(contexts_, handle, job.devices());
    if (free_.size() < events.size()) throw Error(KVF_ERR_BUSY, "too many streams wait for jobs");
    std::list<Wait> placed;
    std::vector<std::atomic<uint32_t> *> words;
    words.reserve(events.size());
    try {
        for (auto &event : events) {
            words.push_back(&words_[free_.back()]);
            place_wait(handle, std::move(event), placed);
        }
        job.signal_at_end(words);
    } catch (...) {
        // The streams that wait already go on.
        for (auto *word : words) word->store(1, std::memory_order_release);
        waits_.splice(waits_.end(), placed);
        throw;
    }
    waits_.splice(waits_.end(), placed);
}

// Makes a stream wait for the free word that is next. Where this throws after the stream has begun
// to wait, the word is not free any more: nobody will know when the stream has passed.
void CudaStreamWaits::place_wait(CUstream stream, std::unique_ptr<CudaStreamEvent> event,
                                 std::list<Wait> &placed) {
    const size_t word = free_.back();
    const CudaContext &context = event->context();
    const CudaDriver &driver = context.driver();
    const CudaCurrent current(context);
    placed.push_back({word, std::move(event)});
    words_[word].store(0);
    const CUdeviceptr address = device_words_ + word * sizeof(uint32_t);
    const CUresult result = driver.cuStreamWaitValue32(stream, address, 1, CU_STREAM_WAIT_VALUE_EQ);
    if (result != CUDA_SUCCESS) {
        placed.pop_back();
        driver.check(result, "cuStreamWaitValue32");
    }
    free_.pop_back();
    try {
        placed.back().passed->record_again(stream);
    } catch (...) {
        placed.pop_back();
        throw;
    }
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
    if (watched) return;
    clean_up(contexts_, [this](const CudaDriver &driver) { driver.cuMemFreeHost(words_); });
}

} // namespace kvf
