// Events that are recorded in a caller's stream, and jobs that follow such a stream.
#pragma once

#include <memory>
#include <vector>

#include "cuda/context.h"
#include "jobs/job.h"

namespace kvf {

// An event in a stream. It has passed when the stream has done all that was queued before it.
class CudaStreamEvent {
public:
    // Records the event. Throws KVF_ERR_DEVICE if the context does not know the stream, and
    // KVF_ERR_INVALID_ARGUMENT if the stream, or one that it would wait for, is being captured into
    // a graph.
    CudaStreamEvent(std::shared_ptr<const CudaContext> context, CUstream stream);
    ~CudaStreamEvent();
    CudaStreamEvent(const CudaStreamEvent &) = delete;
    CudaStreamEvent &operator=(const CudaStreamEvent &) = delete;

    const CudaContext &context() const { return *context_; }
    // Records the event again, behind all that is queued now. The context must be current.
    void record_again(CUstream stream);
    // Returns true if the context is gone, too: whatever uses the context will find that error.
    bool has_passed() const;
    // Blocks until the event has passed, or the context is gone.
    void wait() const;

private:
    const std::shared_ptr<const CudaContext> context_;
    CUevent event_ = nullptr;
};

using CudaStreamEvents = std::vector<std::unique_ptr<CudaStreamEvent>>;

// Records an event in a stream, behind all that is queued now. A default stream (0,
// CU_STREAM_LEGACY, CU_STREAM_PER_THREAD) may be that of any context, since each context has one.
// Then events are recorded in the context that is current on the calling thread, and in those of
// the devices whose memory is `moved`, since arrays name a stream of their own device. If the
// current context is none of `contexts`, events are recorded in all of them. Throws
// KVF_ERR_INVALID_ARGUMENT for a stream that none of the contexts knows, or that is being captured
// into a graph.
CudaStreamEvents record_events(const CudaContexts &contexts, CUstream stream, DeviceSet moved);

// Calls record_events(), and returns a gate that opens when these events have passed.
std::shared_ptr<Gate> follow_stream(const CudaContexts &contexts, uint64_t stream, DeviceSet moved);

} // namespace kvf
