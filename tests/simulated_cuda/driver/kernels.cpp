// Modules and kernels. A module is PTX text; only the kernels of cabi/cuda/gather.cu can be
// launched, which this file does by code of its own.
#include <algorithm>
#include <cctype>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "contexts.h"
#include "entry.h"
#include "operations.h"
#include "streams.h"
#include "view.h"

using namespace simulated;

namespace {

// Checks the PTX text roughly, and notes the names of its kernels.
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

// Returns how many entries a table has.
uint64_t entries(uint32_t row_count, uint32_t rows_each) {
    return (uint64_t{row_count} + rows_each - 1) / rows_each;
}

// Does the work of kvferry_gather or kvferry_scatter, whose parameters are described in gather.cu.
CUresult run_rows(bool gather, int device, uint64_t staging, uint64_t table, uint32_t row_count,
                  uint64_t address_distance, uint32_t offset_distance, uint64_t pitch,
                  uint32_t width, uint32_t rows_each) {
    Driver &d = driver();
    Lock lock(d.mutex);
    View view;
    // Each view remembers the allocation that it found last.
    View rows_view = view;
    View staging_view = view;
    lock.unlock();

    if (row_count == 0) return CUDA_SUCCESS;
    if (table % sizeof(kvferry_row) != 0) return CUDA_ERROR_MISALIGNED_ADDRESS;
    const std::byte *rows =
        table ? view.kernel(table, entries(row_count, rows_each) * sizeof(kvferry_row), device)
              : nullptr;
    if (table && !rows) return CUDA_ERROR_ILLEGAL_ADDRESS;
    uint64_t moved = 0;
    for (uint32_t i = 0; i < row_count; ++i) {
        kvferry_row row{i * pitch, i * width, width};
        if (table) {
            std::memcpy(&row, rows + i / rows_each * sizeof row, sizeof row);
            row.address += i % rows_each * pitch;
            row.offset += i % rows_each * row.bytes;
        }
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

// Returns a parameter of a launch.
template <class T>
T parameter(void **parameters, int index) {
    T value;
    std::memcpy(&value, parameters[index], sizeof value);
    return value;
}

} // namespace

extern "C" {

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    ENTER_UNSAFE(cuModuleLoadData);
    return load_module(module, image);
}

// The options ask for logs, which stay empty.
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
        return CUDA_ERROR_INVALID_VALUE; // kernels of gather.cu need blocks of 512 threads

    const auto staging = parameter<CUdeviceptr>(parameters, 0);
    const auto rows = parameter<CUdeviceptr>(parameters, 1);
    const auto row_count = parameter<uint32_t>(parameters, 2);
    const auto address_distance = parameter<uint64_t>(parameters, 3);
    const auto offset_distance = parameter<uint32_t>(parameters, 4);
    const auto pitch = parameter<uint64_t>(parameters, 5);
    const auto width = parameter<uint32_t>(parameters, 6);
    const auto rows_each = std::max(parameter<uint32_t>(parameters, 7), 1u);
    Operation operation;
    operation.kind = Kind::Kernel;
    operation.uses = {{staging, 1}};
    if (rows) operation.uses.push_back({rows, entries(row_count, rows_each) * sizeof(kvferry_row)});
    operation.run = [=, device = found->context->device] {
        return run_rows(gather, device, staging, rows, row_count, address_distance, offset_distance,
                        pitch, width, rows_each);
    };
    submit(found, std::move(operation));
    return CUDA_SUCCESS;
}

} // extern "C"
