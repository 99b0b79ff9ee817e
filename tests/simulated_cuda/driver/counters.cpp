#include "counters.h"

#include <cstring>

#include "entry.h"

namespace simulated {

void reset_counters() {
    Driver &d = driver();
    for (auto &calls : d.calls) calls = 0;
    for (auto &lanes : d.lanes)
        for (Lane &lane : lanes) lane.peak = lane.queued;
    Counters fresh;
    const Counters &old = d.counters;
    fresh.live_contexts = old.live_contexts;
    fresh.live_streams = old.live_streams;
    fresh.live_events = old.live_events;
    fresh.live_modules = old.live_modules;
    fresh.live_device_allocations = old.live_device_allocations;
    fresh.live_host_allocations = old.live_host_allocations;
    fresh.live_registrations = old.live_registrations;
    fresh.device_bytes = fresh.peak_device_bytes = old.device_bytes;
    fresh.pinned_bytes = fresh.peak_pinned_bytes = old.pinned_bytes;
    fresh.held = old.held;
    d.counters = fresh;
}

} // namespace simulated

using namespace simulated;

extern "C" {

uint64_t kvfsim_count(const char *counter) {
    Driver &d = driver();
    Lock lock(d.mutex);
    Counters &c = d.counters;
    c.live = c.live_contexts + c.live_streams + c.live_events + c.live_modules +
             c.live_device_allocations + c.live_host_allocations + c.live_registrations;
#define COUNT(name, text)                                                                          \
    if (std::strcmp(counter, #name) == 0) return c.name;
    KVFSIM_COUNTERS(COUNT)
#undef COUNT
    return UINT64_MAX;
}

uint64_t kvfsim_calls(const char *entry_point) {
    const int i = find_entry_point(entry_point);
    return i < 0 ? UINT64_MAX : driver().calls[static_cast<size_t>(i)].load();
}

uint64_t kvfsim_peak_queued(int device, int direction) {
    if (device < 0 || device >= kDevices || direction < 0 || direction >= kDirections)
        return UINT64_MAX;
    Driver &d = driver();
    Lock lock(d.mutex);
    return d.lanes[device][direction].peak;
}

} // extern "C"
