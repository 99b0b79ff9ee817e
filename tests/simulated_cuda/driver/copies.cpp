// Copies and fills of memory, in the order of streams.
#include <cstddef>
#include <cstring>
#include <utility>
#include <vector>

#include "allocations.h"
#include "entry.h"
#include "operations.h"
#include "streams.h"
#include "view.h"

using namespace simulated;

namespace {

// A copy of up to so many bytes from pageable memory reads them before the call returns.
constexpr uint64_t kStagedCopy = 64 << 10;

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

// Finds the memory of each row of one side: once for all rows where the whole extent is usable, or
// else row by row.
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

// Submits a copy, and waits for it where CUDA does.
CUresult copy(CUstream handle, const Side &to, const Side &from, Shape shape, Lock &lock) {
    StreamPtr stream;
    if (CUresult error = find_current_stream(handle, &stream)) return error;
    if (shape.width == 0 || shape.height == 0) return CUDA_SUCCESS;
    if (to.address == 0 || from.address == 0) return CUDA_ERROR_INVALID_VALUE;
    // No side may reach from one allocation into another: neither on a device, even if they are
    // neighbours, nor in pinned memory (seen on driver 580). If device memory ends in no
    // allocation, that is an error of execution.
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
    // Device memory, by the name of the call, must be memory that a device can reach.
    if (bytes && ((to_device && target.place == Place::Pageable) ||
                  (from_device && source.place == Place::Pageable)))
        return CUDA_ERROR_INVALID_VALUE;
    return copy(stream, target, source, {bytes, 1}, lock);
}

} // namespace

extern "C" {

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

} // extern "C"
