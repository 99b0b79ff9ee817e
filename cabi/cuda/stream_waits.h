// Streams that wait for jobs.
#pragma once

#include <atomic>
#include <list>
#include <mutex>
#include <vector>

#include "cuda/stream_events.h"

namespace kvf {

// Makes streams wait for jobs. Each wait has a word of pinned memory, which the stream watches and
// the ending job sets. A word is free again when an event behind the wait has passed.
class CudaStreamWaits {
public:
    explicit CudaStreamWaits(CudaContexts contexts);
    // Blocks until the streams have passed: every job has ended by then.
    ~CudaStreamWaits();
    CudaStreamWaits(const CudaStreamWaits &) = delete;
    CudaStreamWaits &operator=(const CudaStreamWaits &) = delete;

    // Makes all that is queued on `stream` from now on wait until the job has ended. Throws
    // KVF_ERR_UNSUPPORTED for a driver older than CUDA 11.7, KVF_ERR_BUSY if too many waits are
    // outstanding, and what record_events() throws. Any thread.
    void make_wait(uint64_t stream, Job &job);

private:
    struct Wait;
    void map_words();
    void collect_passed();
    void place_wait(CUstream stream, std::unique_ptr<CudaStreamEvent> event,
                    std::list<Wait> &placed);

    const CudaContexts contexts_;
    std::mutex mutex_;
    std::atomic<uint32_t> *words_ = nullptr; // pinned
    CUdeviceptr device_words_ = 0;           // the same, as devices address them
    std::vector<size_t> free_;               // words
    std::list<Wait> waits_;
};

} // namespace kvf
