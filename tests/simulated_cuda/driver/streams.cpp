// Streams: what programs create, destroy, query and synchronise, and the words of memory that
// streams wait for and write. (operations.cpp executes what is queued; capture.cpp captures.)
#include "streams.h"

#include <utility>

#include "capture.h"
#include "contexts.h"
#include "entry.h"
#include "operations.h"
#include "view.h"

namespace simulated {

CUresult find_stream(CUstream handle, StreamPtr *stream) {
    if (handle == nullptr || handle == CU_STREAM_LEGACY || handle == CU_STREAM_PER_THREAD) {
        ContextPtr context;
        if (CUresult error = current(&context)) return error;
        *stream = legacy_stream(context);
        return CUDA_SUCCESS;
    }
    auto it = driver().streams.find(handle);
    if (it == driver().streams.end()) return CUDA_ERROR_INVALID_HANDLE;
    *stream = it->second;
    return it->second->context->error;
}

CUresult find_current_stream(CUstream handle, StreamPtr *stream) {
    ContextPtr context;
    if (CUresult error = current(&context)) return error;
    if (CUresult error = find_stream(handle, stream)) return error;
    return (*stream)->context == context ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

} // namespace simulated

using namespace simulated;

namespace {

// Queues a write of a word of memory, or a wait until the word compares with the value as the flags
// say.
CUresult value_operation(CUstream stream, CUdeviceptr address, uint32_t value, unsigned int flags,
                         bool wait) {
    if (address == 0 || address % 4 != 0) return CUDA_ERROR_INVALID_VALUE;
    Lock lock(driver().mutex);
    StreamPtr found;
    if (CUresult error = find_current_stream(stream, &found)) return error;
    std::byte *memory = View().kernel(address, 4, found->context->device);
    if (!memory) return CUDA_ERROR_INVALID_VALUE;
    auto *word = reinterpret_cast<uint32_t *>(memory);
    Operation operation;
    operation.uses = {{address, 4}};
    if (wait)
        operation.ready = [word, value, how = flags & 3u] {
            const uint32_t now = __atomic_load_n(word, __ATOMIC_ACQUIRE);
            switch (how) {
            case CU_STREAM_WAIT_VALUE_GEQ: return static_cast<int32_t>(now - value) >= 0;
            case CU_STREAM_WAIT_VALUE_EQ: return now == value;
            case CU_STREAM_WAIT_VALUE_AND: return (now & value) != 0;
            default: return ~(now | value) != 0;
            }
        };
    else
        operation.run = [word, value] {
            __atomic_store_n(word, value, __ATOMIC_RELEASE);
            return CUDA_SUCCESS;
        };
    submit(found, std::move(operation));
    return CUDA_SUCCESS;
}

} // namespace

extern "C" {

CUresult cuStreamCreateWithPriority(CUstream *stream, unsigned int flags, int) {
    ENTER(cuStreamCreateWithPriority);
    if (!stream || flags > CU_STREAM_NON_BLOCKING) return CUDA_ERROR_INVALID_VALUE;
    Driver &d = driver();
    Lock lock(d.mutex);
    ContextPtr context;
    if (CUresult error = current(&context)) return error;
    *stream = new_handle<CUstream>();
    d.streams[*stream] = new_stream(context, flags != CU_STREAM_NON_BLOCKING);
    ++d.counters.live_streams;
    return CUDA_SUCCESS;
}

// Returns at once. The stream still executes what is queued.
CUresult cuStreamDestroy_v2(CUstream stream) {
    ENTER(cuStreamDestroy_v2);
    Driver &d = driver();
    Lock lock(d.mutex);
    auto it = d.streams.find(stream);
    if (it == d.streams.end()) return CUDA_ERROR_INVALID_HANDLE;
    const StreamPtr found = it->second;
    d.streams.erase(it);
    --d.counters.live_streams;
    close_stream(*found);
    return found->context->error;
}

CUresult cuStreamSynchronize(CUstream stream) {
    ENTER_UNSAFE(cuStreamSynchronize);
    Lock lock(driver().mutex);
    StreamPtr found;
    if (CUresult error = find_stream(stream, &found)) return error;
    if (CUresult error = refuse_captured(*found)) return error;
    wait_for(lock, found->last);
    return found->context->error;
}

CUresult cuStreamQuery(CUstream stream) {
    ENTER_UNSAFE(cuStreamQuery);
    Lock lock(driver().mutex);
    StreamPtr found;
    if (CUresult error = find_stream(stream, &found)) return error;
    if (CUresult error = refuse_captured(*found)) return error;
    return found->last && !found->last->done ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS;
}

CUresult cuStreamWriteValue32_v2(CUstream stream, CUdeviceptr address, uint32_t value,
                                 unsigned int flags) {
    ENTER(cuStreamWriteValue32_v2);
    return value_operation(stream, address, value, flags, false);
}

CUresult cuStreamWaitValue32_v2(CUstream stream, CUdeviceptr address, uint32_t value,
                                unsigned int flags) {
    ENTER(cuStreamWaitValue32_v2);
    return value_operation(stream, address, value, flags, true);
}

} // extern "C"
