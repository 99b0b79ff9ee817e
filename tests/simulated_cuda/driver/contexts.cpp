// Primary contexts, and which of them is current on a thread.
#include "contexts.h"

#include <algorithm>
#include <vector>

#include "allocations.h"
#include "entry.h"
#include "operations.h"

namespace simulated {
namespace {

thread_local std::vector<CUcontext> context_stack;

// Destroys a context whose last reference has been released, with all objects in it.
void destroy(Lock &lock, const ContextPtr &context) {
    Driver &d = driver();
    d.contexts.erase(context->handle);
    break_context(*context, CUDA_ERROR_CONTEXT_IS_DESTROYED);
    context->error = CUDA_ERROR_CONTEXT_IS_DESTROYED;

    for (const StreamPtr &stream : context->streams) close_stream(*stream);
    d.progress.wait(lock, [&] { return context->streams.empty(); });
    context->legacy.reset();
    d.primary[static_cast<size_t>(context->device)].reset();

    const auto abandon = [&](auto &table, uint64_t &live) {
        for (auto it = table.begin(); it != table.end();)
            if (it->second->context == context) {
                it = table.erase(it);
                --live;
                ++d.counters.abandoned;
            } else {
                ++it;
            }
    };
    abandon(d.streams, d.counters.live_streams);
    abandon(d.events, d.counters.live_events);
    abandon(d.modules, d.counters.live_modules);
    std::erase_if(d.functions, [&](const auto &item) { return item.second.context == context; });
    for (;;) {
        auto it = std::find_if(d.allocations.begin(), d.allocations.end(),
                               [&](const auto &item) { return item.second.context == context; });
        if (it == d.allocations.end()) break;
        release_allocation(lock, it->first, true);
    }
}

} // namespace

CUresult current(ContextPtr *context) {
    const CUcontext handle = context_stack.empty() ? nullptr : context_stack.back();
    if (!handle) return CUDA_ERROR_INVALID_CONTEXT;
    auto it = driver().contexts.find(handle);
    if (it == driver().contexts.end()) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    *context = it->second;
    return it->second->error;
}

void break_context(Context &context, CUresult error) {
    if (context.error) return;
    context.error = error;
    if (error != CUDA_ERROR_CONTEXT_IS_DESTROYED) ++driver().counters.sticky_errors;
    driver().progress.notify_all();
}

} // namespace simulated

using namespace simulated;

extern "C" {

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    ENTER_UNSAFE(cuDevicePrimaryCtxRetain);
    Driver &d = driver();
    Lock lock(d.mutex);
    if (!d.has_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    if (!context) return CUDA_ERROR_INVALID_VALUE;
    ContextPtr &primary = d.primary[static_cast<size_t>(device)];
    // Another thread may be destroying a context whose last reference has been released.
    d.progress.wait(lock, [&] { return !primary || primary->retained > 0; });
    if (!primary) {
        if (CUresult error = d.lost[static_cast<size_t>(device)]) return error;
        open_arena(device);
        primary = std::make_shared<Context>();
        primary->handle = new_handle<CUcontext>();
        primary->device = device;
        d.contexts[primary->handle] = primary;
    }
    ++primary->retained;
    ++d.counters.live_contexts;
    *context = primary->handle;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    ENTER_UNSAFE(cuDevicePrimaryCtxRelease_v2);
    Driver &d = driver();
    Lock lock(d.mutex);
    if (!d.has_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    const ContextPtr primary = d.primary[static_cast<size_t>(device)];
    if (!primary || primary->retained == 0) return CUDA_ERROR_INVALID_CONTEXT;
    --d.counters.live_contexts;
    if (--primary->retained == 0) {
        destroy(lock, primary);
        d.progress.notify_all();
    }
    return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent_v2(CUcontext context) {
    ENTER(cuCtxPushCurrent_v2);
    if (!context) return CUDA_ERROR_INVALID_CONTEXT;
    Lock lock(driver().mutex);
    if (!driver().contexts.contains(context)) return CUDA_ERROR_INVALID_CONTEXT;
    context_stack.push_back(context);
    return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent_v2(CUcontext *context) {
    ENTER(cuCtxPopCurrent_v2);
    if (context_stack.empty()) return CUDA_ERROR_INVALID_CONTEXT;
    if (context) *context = context_stack.back();
    context_stack.pop_back();
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
    ENTER(cuCtxSetCurrent);
    Lock lock(driver().mutex);
    if (context && !driver().contexts.contains(context)) return CUDA_ERROR_INVALID_CONTEXT;
    if (!context_stack.empty()) context_stack.pop_back();
    if (context) context_stack.push_back(context);
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
    ENTER(cuCtxGetCurrent);
    if (!context) return CUDA_ERROR_INVALID_VALUE;
    *context = context_stack.empty() ? nullptr : context_stack.back();
    return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize(void) {
    ENTER_UNSAFE(cuCtxSynchronize);
    Lock lock(driver().mutex);
    ContextPtr context;
    if (CUresult error = current(&context)) return error;
    wait_for_context(lock, *context);
    return context->error;
}

} // extern "C"
