#include "entry.h"

#include <cstring>

#include "capture.h"
#include "faults.h"

namespace simulated {
namespace {

struct EntryPointName {
    const char *name;
    const char *symbol;
};
constexpr EntryPointName kNames[] = {
#define NAME(name, symbol, parameters) {#name, #symbol},
    CUDA_DRIVER_ENTRY_POINTS(NAME)
#undef NAME
};

} // namespace

int find_entry_point(const char *name) {
    for (int i = 0; i < kEntryPoints; ++i)
        if (std::strcmp(kNames[i].symbol, name) == 0 || std::strcmp(kNames[i].name, name) == 0)
            return i;
    return -1;
}

CUresult enter(EntryPoint entry_point, bool needs_init, bool unsafe_in_capture) {
    Driver &d = driver();
    ++d.calls[entry_point];
    if (needs_init && (d.forked || !d.initialized)) return CUDA_ERROR_NOT_INITIALIZED;
    if (d.rule_count) {
        Lock lock(d.mutex);
        const EntryPointName &names = kNames[entry_point];
        if (CUresult error = injected_error(names.symbol, names.name)) return error;
    }
    if (unsafe_in_capture && d.capturing && capture_mode == CU_STREAM_CAPTURE_MODE_GLOBAL) {
        Lock lock(d.mutex);
        ++d.counters.capture_violations;
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    return CUDA_SUCCESS;
}

} // namespace simulated
