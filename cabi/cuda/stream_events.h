// Events behind what a caller's stream holds, and jobs that follow such a stream.
#pragma once

#include <memory>
#include <vector>

#include "cuda/context.h"
#include "jobs/job.h"

namespace kvf {

// An event in a stream. Passed means: the stream has done what it held when the event was recorded.
class CudaStreamEvent {
public:
    // Throws KVF_ERR_DEVICE where the context does not know the stream, KVF_ERR_INVALID_ARGUMENT
    // where the stream, or one that it would wait for, is being captured into a graph.
    CudaStreamEvent(std::shared_ptr<const CudaContext> context, CUstream stream);
    ~CudaStreamEvent();
    CudaStreamEvent(const CudaStreamEvent &) = delete;
    CudaStreamEvent &operator=(const CudaStreamEvent &) = delete;

    const CudaContext &context() const { return *context_; }
    // Puts the event behind what the stream holds by now. The context is current.
    void record_again(CUstream stream);
    // Returns true also where the context is gone: whatever uses the context will find that error.
    bool has_passed() const;
    // Blocks until the event has passed, or the context is gone.
    void wait() const;

private:
    const std::shared_ptr<const CudaContext> context_;
    CUevent event_ = nullptr;
};

using CudaStreamEvents = std::vector<std::unique_ptr<CudaStreamEvent>>;

// Records an event behind what a stream holds now. A default stream (0, CU_STREAM_LEGACY,
// CU_STREAM_PER_THREAD) has no name of its own, since each context has one. Then there is an event
// in each of these contexts: the one that is current on the calling thread, and those of the
// devices whose memory is `moved` (arrays name a stream of their device's, whatever is current); or
// in all contexts, where the current one is not the engine's. Throws KVF_ERR_INVALID_ARGUMENT for a
// stream that none of the contexts knows, or that is being captured into a graph.
CudaStreamEvents record_events(const CudaContexts &contexts, CUstream stream, DeviceSet moved);

// Returns a gate that opens when the events that record_events() records have passed. Throws what
// that throws.
std::shared_ptr<Gate> follow_stream(const CudaContexts &contexts, uint64_t stream, DeviceSet moved);

} // namespace kvf
