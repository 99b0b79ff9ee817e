// The entry points.
#include <algorithm>
#include <cctype>
#include <chrono>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "state.h"

// So that a definition below that differs from the table does not compile.
#define DECLARE(name, symbol, parameters)                                                          \
    extern "C" __attribute__((visibility("default"))) CUresult symbol parameters;
CUDA_DRIVER_ENTRY_POINTS(DECLARE)
#undef DECLARE

using namespace simulated;

// A plain entry point, one that a capture in global mode on another thread forbids, and one that
// works before cuInit().
#define ENTER(symbol)                                                                              \
    if (CUresult error = enter(k_##symbol, true, false)) return error
#define ENTER_UNSAFE(symbol)                                                                       \
    if (CUresult error = enter(k_##symbol, true, true)) return error
#define ENTER_EARLY(symbol)                                                                        \
    if (CUresult error = enter(k_##symbol, false, false)) return error

namespace {

constexpr uint64_t kStagedCopy = 64
                                 << 10; // pageable memory up to this is read before a copy returns
constexpr int kMaxPitch = INT_MAX;

thread_local std::vector<CUcontext> context_stack;

// What taking memory costs, without the lock.
void take_time() {
    uint64_t us;
    {
        Lock lock(driver().mutex);
        us = driver().settings.allocation_us;
    }
    if (us) std::this_thread::sleep_for(std::chrono::microseconds(us));
}

bool is_device(int device) {
    return device >= 0 && static_cast<uint64_t>(device) < driver().settings.devices;
}

// ---- Finding things. All with the lock. ---------------------------------------------------------

// The thread's context. CUDA_ERROR_INVALID_CONTEXT without one, or its sticky error.
CUresult current(ContextPtr *context) {
    const CUcontext handle = context_stack.empty() ? nullptr : context_stack.back();
    if (!handle) return CUDA_ERROR_INVALID_CONTEXT;
    auto it = driver().contexts.find(handle);
    if (it == driver().contexts.end()) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    *context = it->second;
    return it->second->error;
}

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

// A stream to submit to: of the current context.
CUresult find_current_stream(CUstream handle, StreamPtr *stream) {
    ContextPtr context;
    if (CUresult error = current(&context)) return error;
    if (CUresult error = find_stream(handle, stream)) return error;
    return (*stream)->context == context ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

// Nobody may ask how far a stream is that is being captured, or an event in it: that breaks the
// capture.
CUresult refuse_captured(Stream &stream) {
    if (!is_captured(stream)) return CUDA_SUCCESS;
    invalidate_capture(stream);
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

CUresult refuse_captured(const Event &event) {
    if (!event.captured) return CUDA_SUCCESS;
    invalidate_capture(*event.captured);
    return CUDA_ERROR_CAPTURED_EVENT;
}

CUresult find_event(CUevent handle, EventPtr *event) {
    auto it = driver().events.find(handle);
    if (it == driver().events.end()) return CUDA_ERROR_INVALID_HANDLE;
    *event = it->second;
    return it->second->context->error;
}

// Destroys a context whose last reference is gone, with all that is in it.
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

// ---- Copies -------------------------------------------------------------------------------------

enum class Place { Device, Pinned, Pageable };

// One side of a copy.
struct Side {
    uint64_t address = 0;
    uint64_t pitch = 0;
    Place place = Place::Pageable;
    int device = -1;

    explicit Side(uint64_t address, uint64_t pitch = 0) : address(address), pitch(pitch) {
        if (const Arena *arena = arena_of(address)) {
            place = Place::Device;
            device = static_cast<int>(arena - driver().arenas.data());
        } else if (allocation_of(address)) {
            place = Place::Pinned;
        }
    }
};

struct Shape {
    uint64_t width = 0;
    uint64_t height = 1;

    uint64_t extent(uint64_t pitch) const { return (height - 1) * pitch + width; }
};

// Usable memory for every row: of the whole extent at once where it is all there, else row by row.
class Rows {
public:
    Rows(View &view, const Side &side, Shape shape)
        : view_(view), side_(side), width_(shape.width),
          whole_(view.any(side.address, shape.extent(side.pitch))) {}

    std::byte *operator[](uint64_t row) {
        const uint64_t skip = row * side_.pitch;
        return whole_ ? whole_ + skip : view_.any(side_.address + skip, width_);
    }

private:
    View &view_;
    Side side_;
    uint64_t width_;
    std::byte *whole_;
};

CUresult move_rows(View &view, const Side &to, const Side &from, Shape shape) {
    Rows targets(view, to, shape), sources(view, from, shape);
    for (uint64_t row = 0; row < shape.height; ++row) {
        std::byte *target = targets[row];
        const std::byte *source = sources[row];
        if (!target || !source) return CUDA_ERROR_ILLEGAL_ADDRESS;
        std::memmove(target, source, shape.width);
    }
    return CUDA_SUCCESS;
}

// Submits a copy; waits for it where CUDA does.
CUresult copy(CUstream handle, const Side &to, const Side &from, Shape shape, Lock &lock) {
    StreamPtr stream;
    if (CUresult error = find_current_stream(handle, &stream)) return error;
    if (shape.width == 0 || shape.height == 0) return CUDA_SUCCESS;
    if (to.address == 0 || from.address == 0) return CUDA_ERROR_INVALID_VALUE;
    // From one allocation into another, neighbours or not, or into pinned memory that was
    // registered for itself (seen on driver 580). What ends in no allocation of the device is found
    // out as it is executed.
    for (const Side &side : {to, from}) {
        if (side.place == Place::Pageable) continue;
        const Allocation *last = allocation_of(side.address + shape.extent(side.pitch) - 1);
        if (last != allocation_of(side.address) && (last || side.place == Place::Pinned))
            return CUDA_ERROR_INVALID_VALUE;
    }

    Operation operation;
    operation.kind = Kind::Copy;
    operation.bytes = shape.width * shape.height;
    operation.uses = {{to.address, shape.extent(to.pitch)},
                      {from.address, shape.extent(from.pitch)}};
    if (from.place == Place::Device) {
        operation.device = from.device;
        operation.direction = to.place == Place::Device ? KVFSIM_DEVICE : KVFSIM_SAVE;
    } else if (to.place == Place::Device) {
        operation.device = to.device;
        operation.direction = KVFSIM_LOAD;
    }

    const bool pageable = to.place == Place::Pageable || from.place == Place::Pageable;
    const bool staged = from.place == Place::Pageable && to.place != Place::Pageable &&
                        operation.bytes <= kStagedCopy && is_mapped(operation.uses[1]);
    std::vector<std::byte> source;
    Side staged_from = from;
    if (staged) {
        source.resize(shape.extent(from.pitch));
        std::memcpy(source.data(), reinterpret_cast<const void *>(from.address), source.size());
        operation.uses.pop_back();
    }
    operation.run = [to, staged_from, shape, staged, source = std::move(source)]() mutable {
        Lock lock(driver().mutex);
        View view;
        lock.unlock();
        if (staged) staged_from.address = reinterpret_cast<uint64_t>(source.data());
        return move_rows(view, to, staged_from, shape);
    };
    const CompletionPtr completion = submit(stream, std::move(operation));
    if (!pageable || staged) return CUDA_SUCCESS;
    wait_for(lock, completion);
    return stream->context->error;
}

CUresult copy_run(CUstream stream, uint64_t to, uint64_t from, uint64_t bytes, bool to_device,
                  bool from_device) {
    Lock lock(driver().mutex);
    const Side target(to), source(from);
    // What is named as device memory must be memory that a device can reach.
    if (bytes && ((to_device && target.place == Place::Pageable) ||
                  (from_device && source.place == Place::Pageable)))
        return CUDA_ERROR_INVALID_VALUE;
    return copy(stream, target, source, {bytes, 1}, lock);
}

// ---- Kernels ------------------------------------------------------------------------------------

CUresult run_rows(bool gather, int device, uint64_t staging, uint64_t table, uint32_t row_count,
                  uint64_t address_distance, uint32_t offset_distance, uint64_t pitch,
                  uint32_t width) {
    Driver &d = driver();
    Lock lock(d.mutex);
    View view;
    View rows_view = view; // each remembers where it found something last
    View staging_view = view;
    lock.unlock();

    if (row_count == 0) return CUDA_SUCCESS;
    if (table % sizeof(kvferry_row) != 0) return CUDA_ERROR_MISALIGNED_ADDRESS;
    const std::byte *rows =
        table ? view.kernel(table, uint64_t{row_count} * sizeof(kvferry_row), device) : nullptr;
    if (table && !rows) return CUDA_ERROR_ILLEGAL_ADDRESS;
    uint64_t moved = 0;
    for (uint32_t i = 0; i < row_count; ++i) {
        kvferry_row row{i * pitch, i * width, width};
        if (table) std::memcpy(&row, rows + i * sizeof row, sizeof row);
        if (row.bytes == 0) continue;
        row.address += address_distance;
        row.offset += offset_distance;
        std::byte *memory = rows_view.kernel(row.address, row.bytes, device);
        std::byte *place = staging_view.kernel(staging + row.offset, row.bytes, device);
        if (!memory || !place) return CUDA_ERROR_ILLEGAL_ADDRESS;
        std::memmove(gather ? place : memory, gather ? memory : place, row.bytes);
        moved += row.bytes;
    }
    lock.lock();
    d.counters.kernel_rows += row_count;
    d.counters.kernel_bytes += moved;
    return CUDA_SUCCESS;
}

template <class T>
T parameter(void **parameters, int index) {
    T value;
    std::memcpy(&value, parameters[index], sizeof value);
    return value;
}

// ---- Pointer attributes -------------------------------------------------------------------------

template <class T>
void write(void *to, T value) {
    std::memcpy(to, &value, sizeof value);
}

CUresult attribute_of(void *value, CUpointer_attribute attribute, const Allocation *a,
                      uint64_t address) {
    switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT: write(value, a ? a->context->handle : nullptr); break;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
        write<unsigned int>(value, !a             ? 0
                                   : a->on_device ? CU_MEMORYTYPE_DEVICE
                                                  : CU_MEMORYTYPE_HOST);
        break;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: write<CUdeviceptr>(value, a ? address : 0); break;
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
        if (a && a->on_device) return CUDA_ERROR_INVALID_VALUE;
        write<uint64_t>(value, a ? address : 0);
        break;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID: write<unsigned long long>(value, a ? a->id : 0); break;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED: write<unsigned int>(value, 0); break;
    case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE:
        write<unsigned int>(value, a && a->on_device && !a->ordered ? 1 : 0);
        break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
        write<int>(value, a ? a->context->device : CU_DEVICE_INVALID);
        break;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
        write<CUdeviceptr>(value, a ? a->range.address : 0);
        break;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE: write<size_t>(value, a ? a->range.bytes : 0); break;
    case CU_POINTER_ATTRIBUTE_MAPPED: write<unsigned int>(value, a ? 1 : 0); break;
    default: return CUDA_ERROR_NOT_SUPPORTED;
    }
    return CUDA_SUCCESS;
}

// ---- Modules ------------------------------------------------------------------------------------

CUresult load_module(CUmodule *module, const void *image) {
    if (!module || !image) return CUDA_ERROR_INVALID_VALUE;
    const std::string text = static_cast<const char *>(image);
    if (text.find(".version") == std::string::npos || text.find(".target") == std::string::npos)
        return CUDA_ERROR_INVALID_IMAGE;
    if (std::count(text.begin(), text.end(), '{') != std::count(text.begin(), text.end(), '}'))
        return CUDA_ERROR_INVALID_PTX;
    Driver &d = driver();
    Lock lock(d.mutex);
    auto loaded = std::make_shared<Module>();
    if (CUresult error = current(&loaded->context)) return error;
    const std::string word = ".entry";
    for (size_t at = text.find(word); at != std::string::npos; at = text.find(word, at)) {
        at = std::min(text.find_first_not_of(" \t\n", at + word.size()), text.size());
        size_t end = at;
        while (end < text.size() &&
               (std::isalnum(static_cast<unsigned char>(text[end])) || text[end] == '_'))
            ++end;
        loaded->entries.push_back(text.substr(at, end - at));
    }
    *module = new_handle<CUmodule>();
    d.modules[*module] = loaded;
    ++d.counters.live_modules;
    return CUDA_SUCCESS;
}

} // namespace

extern "C" {

// ---- The driver, its errors, its devices --------------------------------------------------------

CUresult cuInit(unsigned int flags) {
    ENTER_EARLY(cuInit);
    Driver &d = driver();
    if (d.forked) return CUDA_ERROR_NOT_INITIALIZED;
    Lock lock(d.mutex);
    if (const uint64_t ms = d.settings.init_ms) {
        lock.unlock();
        std::this_thread::sleep_for(std::chrono::milliseconds(ms));
        lock.lock();
    }
    if (flags) return CUDA_ERROR_INVALID_VALUE;
    if (d.settings.init_error) return static_cast<CUresult>(d.settings.init_error);
    if (d.settings.devices == 0) return CUDA_ERROR_NO_DEVICE;
    d.initialized = true;
    return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
    ENTER_EARLY(cuDriverGetVersion);
    if (!version) return CUDA_ERROR_INVALID_VALUE;
    Lock lock(driver().mutex);
    *version = static_cast<int>(driver().settings.driver_version);
    return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char **name) {
    ENTER_EARLY(cuGetErrorName);
    switch (error) {
#define NAME(name_, number, text)                                                                  \
    case name_: *name = #name_; return CUDA_SUCCESS;
        CUDA_DRIVER_ERRORS(NAME)
#undef NAME
    }
    *name = nullptr;
    return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    ENTER_EARLY(cuGetErrorString);
    switch (error) {
#define TEXT(name, number, text_)                                                                  \
    case name: *text = text_; return CUDA_SUCCESS;
        CUDA_DRIVER_ERRORS(TEXT)
#undef TEXT
    }
    *text = nullptr;
    return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuDeviceGetCount(int *count) {
    ENTER(cuDeviceGetCount);
    if (!count) return CUDA_ERROR_INVALID_VALUE;
    Lock lock(driver().mutex);
    *count = static_cast<int>(driver().settings.devices);
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    ENTER(cuDeviceGet);
    if (!device) return CUDA_ERROR_INVALID_VALUE;
    Lock lock(driver().mutex);
    if (!is_device(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char *name, int size, CUdevice device) {
    ENTER(cuDeviceGetName);
    Lock lock(driver().mutex);
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    if (!name || size <= 0) return CUDA_ERROR_INVALID_VALUE;
    std::snprintf(name, static_cast<size_t>(size), "Simulated GPU %d", device);
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    ENTER(cuDeviceGetAttribute);
    Lock lock(driver().mutex);
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    if (!value) return CUDA_ERROR_INVALID_VALUE;
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_PITCH: *value = kMaxPitch; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT: *value = 3; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_PCI_BUS_ID: *value = 0x10 + device; break;
    case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED:
        *value = driver().settings.memory_pools != 0;
        break;
    case CU_DEVICE_ATTRIBUTE_GPU_OVERLAP:
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM:
    case CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_CAN_USE_STREAM_WAIT_VALUE_NOR: *value = 1; break;
    default: *value = 0; break;
    }
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetPCIBusId(char *id, int size, CUdevice device) {
    ENTER(cuDeviceGetPCIBusId);
    Lock lock(driver().mutex);
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    if (!id || size < 13) return CUDA_ERROR_INVALID_VALUE;
    std::snprintf(id, static_cast<size_t>(size), "0000:%02x:00.0",
                  0x10u + static_cast<unsigned int>(device));
    return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    ENTER(cuDeviceTotalMem_v2);
    Lock lock(driver().mutex);
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    if (!bytes) return CUDA_ERROR_INVALID_VALUE;
    *bytes = std::min(driver().settings.device_bytes, driver().settings.device_limit);
    return CUDA_SUCCESS;
}

// ---- Contexts -----------------------------------------------------------------------------------

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    ENTER_UNSAFE(cuDevicePrimaryCtxRetain);
    Driver &d = driver();
    Lock lock(d.mutex);
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    if (!context) return CUDA_ERROR_INVALID_VALUE;
    ContextPtr &primary = d.primary[static_cast<size_t>(device)];
    // One whose last reference is just going away: wait for its end.
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
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
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

// ---- Streams ------------------------------------------------------------------------------------

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

// Returns at once; what is queued goes on.
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

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    ENTER(cuStreamIsCapturing);
    if (!status) return CUDA_ERROR_INVALID_VALUE;
    Lock lock(driver().mutex);
    StreamPtr found;
    if (CUresult error = find_stream(stream, &found)) return error;
    if (meets_capture(*found->context, *found)) return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    *status = found->capture;
    return CUDA_SUCCESS;
}

CUresult cuStreamBeginCapture_v2(CUstream stream, CUstreamCaptureMode) {
    Lock lock(driver().mutex);
    StreamPtr found;
    if (CUresult error = find_stream(stream, &found)) return error;
    if (found == found->context->legacy || is_captured(*found))
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    found->capture = CU_STREAM_CAPTURE_STATUS_ACTIVE;
    return CUDA_SUCCESS;
}

CUresult cuStreamEndCapture(CUstream stream, CUgraph *graph) {
    Lock lock(driver().mutex);
    StreamPtr found;
    if (CUresult error = find_stream(stream, &found)) return error;
    if (!graph || !is_captured(*found)) return CUDA_ERROR_INVALID_VALUE;
    const bool whole = found->capture == CU_STREAM_CAPTURE_STATUS_ACTIVE;
    found->capture = CU_STREAM_CAPTURE_STATUS_NONE;
    *graph = whole ? new_handle<CUgraph>() : nullptr;
    return whole ? CUDA_SUCCESS : CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
}

// The event may be of another context.
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

static CUresult value_operation(CUstream stream, CUdeviceptr address, uint32_t value,
                                unsigned int flags, bool wait) {
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

// ---- Events -------------------------------------------------------------------------------------

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

static CUresult elapsed(float *milliseconds, CUevent start, CUevent end) {
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

CUresult cuEventElapsedTime(float *milliseconds, CUevent start, CUevent end) {
    ENTER(cuEventElapsedTime);
    return elapsed(milliseconds, start, end);
}

CUresult cuEventElapsedTime_v2(float *milliseconds, CUevent start, CUevent end) {
    ENTER(cuEventElapsedTime_v2);
    return elapsed(milliseconds, start, end);
}

// ---- Memory -------------------------------------------------------------------------------------

CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t bytes) {
    ENTER_UNSAFE(cuMemAlloc_v2);
    if (!address || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    take_time();
    Lock lock(driver().mutex);
    ContextPtr context;
    if (CUresult error = current(&context)) return error;
    uint64_t found = 0;
    const CUresult result = allocate_device(context, bytes, &found);
    if (!result) *address = found;
    return result;
}

CUresult cuMemFree_v2(CUdeviceptr address) {
    ENTER_UNSAFE(cuMemFree_v2);
    if (address == 0) return CUDA_SUCCESS;
    Lock lock(driver().mutex);
    const Allocation *allocation = allocation_of(address);
    if (!allocation || !allocation->on_device || allocation->range.address != address)
        return CUDA_ERROR_INVALID_VALUE;
    const ContextPtr context = allocation->context;
    release_allocation(lock, address, false);
    return context->error;
}

// Taken at once, whatever the stream still holds: stricter about room than the driver.
CUresult cuMemAllocAsync(CUdeviceptr *address, size_t bytes, CUstream stream) {
    ENTER(cuMemAllocAsync);
    if (!address || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    take_time();
    Driver &d = driver();
    Lock lock(d.mutex);
    if (!d.settings.memory_pools) return CUDA_ERROR_NOT_SUPPORTED;
    StreamPtr found;
    if (CUresult error = find_current_stream(stream, &found)) return error;
    uint64_t at = 0;
    if (CUresult error = allocate_device(found->context, bytes, &at)) return error;
    d.allocations.at(at).ordered = true;
    *address = at;
    return CUDA_SUCCESS;
}

// In the order of the stream; waits for nothing else.
CUresult cuMemFreeAsync(CUdeviceptr address, CUstream stream) {
    ENTER(cuMemFreeAsync);
    if (address == 0) return CUDA_ERROR_INVALID_VALUE;
    Lock lock(driver().mutex);
    StreamPtr found;
    if (CUresult error = find_current_stream(stream, &found)) return error;
    const Allocation *allocation = allocation_of(address);
    if (!allocation || !allocation->on_device || allocation->range.address != address)
        return CUDA_ERROR_INVALID_VALUE;
    Operation operation;
    operation.run = [address] {
        Lock inner(driver().mutex);
        const Allocation *freed = allocation_of(address);
        if (!freed || freed->range.address != address) return CUDA_ERROR_INVALID_VALUE;
        free_in_order(address);
        return CUDA_SUCCESS;
    };
    submit(found, std::move(operation));
    return CUDA_SUCCESS;
}

CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total_bytes) {
    ENTER(cuMemGetInfo_v2);
    if (!free_bytes || !total_bytes) return CUDA_ERROR_INVALID_VALUE;
    Driver &d = driver();
    Lock lock(d.mutex);
    ContextPtr context;
    if (CUresult error = current(&context)) return error;
    const Arena &arena = d.arenas[static_cast<size_t>(context->device)];
    *total_bytes = std::min(arena.bytes, d.settings.device_limit);
    *free_bytes = *total_bytes - std::min<uint64_t>(*total_bytes, arena.allocated);
    return CUDA_SUCCESS;
}

CUresult cuMemHostAlloc(void **address, size_t bytes, unsigned int flags) {
    ENTER_UNSAFE(cuMemHostAlloc);
    if (!address || bytes == 0 || flags > 7) return CUDA_ERROR_INVALID_VALUE;
    take_time();
    Lock lock(driver().mutex);
    ContextPtr context;
    if (CUresult error = current(&context)) return error;
    void *memory = nullptr; // from the allocator, so that ASan watches its edges
    if (posix_memalign(&memory, 4096, bytes) != 0) return CUDA_ERROR_OUT_OF_MEMORY;
    if (CUresult error = pin(context, {reinterpret_cast<uint64_t>(memory), bytes}, false)) {
        std::free(memory);
        return error;
    }
    *address = memory;
    return CUDA_SUCCESS;
}

CUresult cuMemFreeHost(void *address) {
    ENTER_UNSAFE(cuMemFreeHost);
    Lock lock(driver().mutex);
    const Allocation *allocation = allocation_of(reinterpret_cast<uint64_t>(address));
    if (!allocation || allocation->on_device || allocation->registered ||
        allocation->range.address != reinterpret_cast<uint64_t>(address))
        return CUDA_ERROR_INVALID_VALUE;
    const ContextPtr context = allocation->context;
    release_allocation(lock, allocation->range.address, false);
    return context->error;
}

CUresult cuMemHostRegister_v2(void *address, size_t bytes, unsigned int flags) {
    ENTER_UNSAFE(cuMemHostRegister_v2);
    if (!address || bytes == 0 || flags > 15) return CUDA_ERROR_INVALID_VALUE;
    take_time();
    const Range range = {reinterpret_cast<uint64_t>(address), bytes};
    Lock lock(driver().mutex);
    ContextPtr context;
    if (CUresult error = current(&context)) return error;
    if (arena_of(range.address) || !is_mapped(range)) return CUDA_ERROR_INVALID_VALUE;
    return pin(context, range, true);
}

CUresult cuMemHostUnregister(void *address) {
    ENTER_UNSAFE(cuMemHostUnregister);
    if (!address) return CUDA_ERROR_INVALID_VALUE;
    Lock lock(driver().mutex);
    const Allocation *allocation = allocation_of(reinterpret_cast<uint64_t>(address));
    if (!allocation || !allocation->registered ||
        allocation->range.address != reinterpret_cast<uint64_t>(address))
        return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
    const ContextPtr context = allocation->context;
    release_allocation(lock, allocation->range.address, false);
    return context->error;
}

CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr *device_address, void *address,
                                      unsigned int flags) {
    ENTER(cuMemHostGetDevicePointer_v2);
    if (!device_address || flags) return CUDA_ERROR_INVALID_VALUE;
    Lock lock(driver().mutex);
    ContextPtr context;
    if (CUresult error = current(&context)) return error;
    const Allocation *allocation = allocation_of(reinterpret_cast<uint64_t>(address));
    if (!allocation || allocation->on_device) return CUDA_ERROR_INVALID_VALUE;
    *device_address = reinterpret_cast<uint64_t>(address);
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
    ENTER(cuPointerGetAttribute);
    if (!value) return CUDA_ERROR_INVALID_VALUE;
    Lock lock(driver().mutex);
    const Allocation *allocation = allocation_of(address);
    if (!allocation) return CUDA_ERROR_INVALID_VALUE;
    return attribute_of(value, attribute, allocation, address);
}

// Unlike the one above: for an unknown pointer the values are zero, and the ordinal is
// CU_DEVICE_INVALID.
CUresult cuPointerGetAttributes(unsigned int count, CUpointer_attribute *attributes, void **values,
                                CUdeviceptr address) {
    ENTER(cuPointerGetAttributes);
    if (count == 0 || !attributes || !values) return CUDA_ERROR_INVALID_VALUE;
    Lock lock(driver().mutex);
    const Allocation *allocation = allocation_of(address);
    for (unsigned int i = 0; i < count; ++i) {
        const CUresult error = attribute_of(values[i], attributes[i], allocation, address);
        if (error == CUDA_ERROR_INVALID_VALUE)
            write<uint64_t>(values[i], 0); // the host address of device memory
        else if (error)
            return error;
    }
    return CUDA_SUCCESS;
}

// ---- Copies -------------------------------------------------------------------------------------

CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    ENTER(cuMemcpyAsync);
    return copy_run(stream, to, from, bytes, false, false);
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, CUstream stream) {
    ENTER(cuMemcpyHtoDAsync_v2);
    return copy_run(stream, to, reinterpret_cast<uint64_t>(from), bytes, true, false);
}

CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, CUstream stream) {
    ENTER(cuMemcpyDtoHAsync_v2);
    return copy_run(stream, reinterpret_cast<uint64_t>(to), from, bytes, false, true);
}

CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    ENTER(cuMemcpyDtoDAsync_v2);
    return copy_run(stream, to, from, bytes, true, true);
}

CUresult cuMemcpy2DAsync_v2(const CUDA_MEMCPY2D *c, CUstream stream) {
    ENTER(cuMemcpy2DAsync_v2);
    if (!c) return CUDA_ERROR_INVALID_VALUE;
    const auto address = [](CUmemorytype type, const void *host, CUdeviceptr device) -> uint64_t {
        if (type == CU_MEMORYTYPE_HOST) return reinterpret_cast<uint64_t>(host);
        return type == CU_MEMORYTYPE_DEVICE || type == CU_MEMORYTYPE_UNIFIED ? device : 0;
    };
    uint64_t to = address(c->dstMemoryType, c->dstHost, c->dstDevice);
    uint64_t from = address(c->srcMemoryType, c->srcHost, c->srcDevice);
    const Shape shape = {c->WidthInBytes, c->Height};
    if (shape.width == 0 || shape.height == 0) return CUDA_SUCCESS;
    if (to == 0 || from == 0) return CUDA_ERROR_INVALID_VALUE;
    // A pitch of 0 means rows without gaps.
    const uint64_t to_pitch = c->dstPitch ? c->dstPitch : shape.width + c->dstXInBytes;
    const uint64_t from_pitch = c->srcPitch ? c->srcPitch : shape.width + c->srcXInBytes;
    if (to_pitch > kMaxPitch || from_pitch > kMaxPitch || to_pitch < shape.width + c->dstXInBytes ||
        from_pitch < shape.width + c->srcXInBytes)
        return CUDA_ERROR_INVALID_VALUE;
    to += c->dstY * to_pitch + c->dstXInBytes;
    from += c->srcY * from_pitch + c->srcXInBytes;

    Lock lock(driver().mutex);
    const Side target(to, to_pitch), source(from, from_pitch);
    if ((c->dstMemoryType == CU_MEMORYTYPE_DEVICE && target.place == Place::Pageable) ||
        (c->srcMemoryType == CU_MEMORYTYPE_DEVICE && source.place == Place::Pageable))
        return CUDA_ERROR_INVALID_VALUE;
    return copy(stream, target, source, shape, lock);
}

CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, CUstream stream) {
    ENTER(cuMemsetD8Async);
    Lock lock(driver().mutex);
    StreamPtr found;
    if (CUresult error = find_current_stream(stream, &found)) return error;
    if (bytes == 0) return CUDA_SUCCESS;
    if (Side(to).place == Place::Pageable) return CUDA_ERROR_INVALID_VALUE;
    Operation operation;
    operation.uses = {{to, bytes}};
    operation.run = [to, value, bytes, device = found->context->device] {
        Lock inner(driver().mutex);
        View view;
        inner.unlock();
        std::byte *memory = view.kernel(to, bytes, device);
        if (!memory) return CUDA_ERROR_ILLEGAL_ADDRESS;
        std::memset(memory, value, bytes);
        return CUDA_SUCCESS;
    };
    submit(found, std::move(operation));
    return CUDA_SUCCESS;
}

// ---- Modules and kernels ------------------------------------------------------------------------

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    ENTER_UNSAFE(cuModuleLoadData);
    return load_module(module, image);
}

// The options ask for logs; they stay empty.
CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned int option_count,
                            CUjit_option *options, void **option_values) {
    ENTER_UNSAFE(cuModuleLoadDataEx);
    for (unsigned int i = 0; i < option_count; ++i)
        if (options[i] == CU_JIT_INFO_LOG_BUFFER || options[i] == CU_JIT_ERROR_LOG_BUFFER)
            *static_cast<char *>(option_values[i]) = 0;
    return load_module(module, image);
}

CUresult cuModuleUnload(CUmodule module) {
    ENTER_UNSAFE(cuModuleUnload);
    Driver &d = driver();
    Lock lock(d.mutex);
    auto it = d.modules.find(module);
    if (it == d.modules.end()) return CUDA_ERROR_INVALID_HANDLE;
    const CUresult error = it->second->context->error;
    for (CUfunction function : it->second->functions) d.functions.erase(function);
    d.modules.erase(it);
    --d.counters.live_modules;
    return error;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    ENTER(cuModuleGetFunction);
    if (!function || !name) return CUDA_ERROR_INVALID_VALUE;
    Driver &d = driver();
    Lock lock(d.mutex);
    auto it = d.modules.find(module);
    if (it == d.modules.end()) return CUDA_ERROR_INVALID_HANDLE;
    Module &found = *it->second;
    if (found.context->error) return found.context->error;
    if (std::find(found.entries.begin(), found.entries.end(), name) == found.entries.end())
        return CUDA_ERROR_NOT_FOUND;
    *function = new_handle<CUfunction>();
    d.functions[*function] = {found.context, name};
    found.functions.push_back(*function);
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned int grid_x, unsigned int grid_y,
                        unsigned int grid_z, unsigned int block_x, unsigned int block_y,
                        unsigned int block_z, unsigned int shared_bytes, CUstream stream,
                        void **parameters, void **extra) {
    ENTER(cuLaunchKernel);
    Driver &d = driver();
    Lock lock(d.mutex);
    StreamPtr found;
    if (CUresult error = find_current_stream(stream, &found)) return error;
    auto it = d.functions.find(function);
    if (it == d.functions.end() || it->second.context != found->context)
        return CUDA_ERROR_INVALID_HANDLE;
    const bool gather = it->second.name == "kvferry_gather";
    if (!gather && it->second.name != "kvferry_scatter") return CUDA_ERROR_NOT_SUPPORTED;
    const uint64_t blocks = uint64_t{grid_x} * grid_y * grid_z;
    const uint64_t threads = uint64_t{block_x} * block_y * block_z;
    if (!parameters || extra || blocks == 0 || threads == 0 || threads > 1024 || grid_y > 65535 ||
        grid_z > 65535 || shared_bytes > (48u << 10))
        return CUDA_ERROR_INVALID_VALUE;
    if (block_x != 512 || threads != 512 || blocks != grid_x)
        return CUDA_ERROR_INVALID_VALUE; // as gather.cu

    const auto staging = parameter<CUdeviceptr>(parameters, 0);
    const auto rows = parameter<CUdeviceptr>(parameters, 1);
    const auto row_count = parameter<uint32_t>(parameters, 2);
    const auto address_distance = parameter<uint64_t>(parameters, 3);
    const auto offset_distance = parameter<uint32_t>(parameters, 4);
    const auto pitch = parameter<uint64_t>(parameters, 5);
    const auto width = parameter<uint32_t>(parameters, 6);
    Operation operation;
    operation.kind = Kind::Kernel;
    operation.uses = {{staging, 1}};
    if (rows) operation.uses.push_back({rows, uint64_t{row_count} * sizeof(kvferry_row)});
    operation.run = [=, device = found->context->device] {
        return run_rows(gather, device, staging, rows, row_count, address_distance, offset_distance,
                        pitch, width);
    };
    submit(found, std::move(operation));
    return CUDA_SUCCESS;
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *mode) {
    ENTER(cuThreadExchangeStreamCaptureMode);
    if (!mode || *mode > CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_ERROR_INVALID_VALUE;
    std::swap(*mode, capture_mode);
    return CUDA_SUCCESS;
}

} // extern "C"
