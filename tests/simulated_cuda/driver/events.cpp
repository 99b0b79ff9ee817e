// Events: records in streams, waits for them, and the time between two of them.
#include <utility>

#include "capture.h"
#include "contexts.h"
#include "entry.h"
#include "operations.h"
#include "streams.h"

using namespace simulated;

namespace {

CUresult find_event(CUevent handle, EventPtr *event) {
    auto it = driver().events.find(handle);
    if (it == driver().events.end()) return CUDA_ERROR_INVALID_HANDLE;
    *event = it->second;
    return it->second->context->error;
}

CUresult elapsed(float *milliseconds, CUevent start, CUevent end) {
    if (!milliseconds) return CUDA_ERROR_INVALID_VALUE;
    Lock lock(driver().mutex);
    EventPtr first, second;
    if (CUresult error = find_event(start, &first)) return error;
    if (CUresult error = find_event(end, &second)) return error;
    if (!first->record || !second->record ||
        ((first->flags | second->flags) & CU_EVENT_DISABLE_TIMING))
        return CUDA_ERROR_INVALID_HANDLE;
    if (!first->record->done || !second->record->done) return CUDA_ERROR_NOT_READY;
    *milliseconds = static_cast<float>((static_cast<double>(second->record->time_ns) -
                                        static_cast<double>(first->record->time_ns)) *
                                       1e-6);
    return CUDA_SUCCESS;
}

} // namespace

extern "C" {

CUresult cuEventCreate(CUevent *event, unsigned int flags) {
    ENTER(cuEventCreate);
    if (!event || flags > 7) return CUDA_ERROR_INVALID_VALUE;
    Driver &d = driver();
    Lock lock(d.mutex);
    auto made = std::make_shared<Event>();
    made->flags = flags;
    if (CUresult error = current(&made->context)) return error;
    *event = new_handle<CUevent>();
    d.events[*event] = made;
    ++d.counters.live_events;
    return CUDA_SUCCESS;
}

CUresult cuEventDestroy_v2(CUevent event) {
    ENTER(cuEventDestroy_v2);
    Driver &d = driver();
    Lock lock(d.mutex);
    auto it = d.events.find(event);
    if (it == d.events.end()) return CUDA_ERROR_INVALID_HANDLE;
    const CUresult error = it->second->context->error;
    d.events.erase(it);
    --d.counters.live_events;
    return error;
}

CUresult cuEventRecord(CUevent event, CUstream stream) {
    ENTER(cuEventRecord);
    Lock lock(driver().mutex);
    StreamPtr found;
    EventPtr recorded;
    if (CUresult error = find_stream(stream, &found)) return error;
    if (CUresult error = find_event(event, &recorded)) return error;
    if (recorded->context != found->context) return CUDA_ERROR_INVALID_HANDLE;
    if (meets_capture(*found->context, *found)) {
        for (const StreamPtr &other : found->context->streams)
            if (other->blocking) invalidate_capture(*other);
        return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    }
    recorded->captured = is_captured(*found) ? found : nullptr;
    recorded->record = recorded->captured ? nullptr : submit(found, {});
    return CUDA_SUCCESS;
}

CUresult cuEventQuery(CUevent event) {
    ENTER_UNSAFE(cuEventQuery);
    Lock lock(driver().mutex);
    EventPtr found;
    if (CUresult error = find_event(event, &found)) return error;
    if (CUresult error = refuse_captured(*found)) return error;
    return found->record && !found->record->done ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS;
}

CUresult cuEventSynchronize(CUevent event) {
    ENTER_UNSAFE(cuEventSynchronize);
    Lock lock(driver().mutex);
    EventPtr found;
    if (CUresult error = find_event(event, &found)) return error;
    if (CUresult error = refuse_captured(*found)) return error;
    wait_for(lock, found->record);
    return found->context->error;
}

// The event may be of another context than the stream.
CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned int flags) {
    ENTER(cuStreamWaitEvent);
    if (flags > 1) return CUDA_ERROR_INVALID_VALUE;
    Lock lock(driver().mutex);
    StreamPtr found;
    EventPtr waited;
    if (CUresult error = find_stream(stream, &found)) return error;
    if (CUresult error = find_event(event, &waited)) return error;
    if (!waited->record) return CUDA_SUCCESS;
    Operation operation;
    operation.after = {waited->record};
    submit(found, std::move(operation));
    return CUDA_SUCCESS;
}

CUresult cuEventElapsedTime(float *milliseconds, CUevent start, CUevent end) {
    ENTER(cuEventElapsedTime);
    return elapsed(milliseconds, start, end);
}

CUresult cuEventElapsedTime_v2(float *milliseconds, CUevent start, CUevent end) {
    ENTER(cuEventElapsedTime_v2);
    return elapsed(milliseconds, start, end);
}

} // extern "C"
