// Streams of the caller's, and jobs that follow them or that they follow.
#pragma once

#include <list>
#include <mutex>

#include "cuda/driver.h"
#include "jobs/job.h"

namespace kvf {

// A default stream (0, CU_STREAM_LEGACY, CU_STREAM_PER_THREAD) has no name of its own: each context has one.
// Meant are that of the context which is current on the calling thread and those of the devices whose memory is
// moved (arrays name a stream of their device's, whatever is current); where no context of the engine's is
// current, those of all devices.

// A gate behind what a stream holds now. Throws KVF_ERR_INVALID_ARGUMENT for a stream that none of the
// contexts knows, or that is being captured into a graph. `moved`: the devices whose memory is.
std::shared_ptr<Gate> follow_stream(const CudaContexts &contexts, uint64_t stream, DeviceSet moved);

// Makes streams wait for jobs: a word of pinned memory for each wait, which the stream watches and the
// ending job sets. A word is used again when an event behind the wait has passed.
class CudaStreamWaits {
public:
    explicit CudaStreamWaits(CudaContexts contexts);
    // Blocks until the streams have passed: every job has ended by then.
    ~CudaStreamWaits();
    CudaStreamWaits(const CudaStreamWaits &) = delete;
    CudaStreamWaits &operator=(const CudaStreamWaits &) = delete;

    // What `stream` is given from now on waits until the job has ended. Throws KVF_ERR_UNSUPPORTED for a
    // driver older than CUDA 11.7, KVF_ERR_INVALID_ARGUMENT as follow_stream() does, KVF_ERR_BUSY where too
    // many waits are outstanding.
    void make_wait(uint64_t stream, Job &job);

private:
    struct Wait;
    void map_words();
    void collect();

    const CudaContexts contexts_;
    std::mutex mutex_;
    std::atomic<uint32_t> *words_ = nullptr; // pinned
    CUdeviceptr device_words_ = 0;
    std::vector<size_t> free_;
    std::list<Wait> waits_;
};

} // namespace kvf
