#include <pthread.h>

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cstdlib>
#include <cstring>

#include "state.h"

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

// Its number, or -1.
int find_entry_point(const char *name) {
    for (int i = 0; i < kEntryPoints; ++i)
        if (std::strcmp(kNames[i].symbol, name) == 0 || std::strcmp(kNames[i].name, name) == 0)
            return i;
    return -1;
}

bool is_execution(const char *what) {
    return std::strcmp(what, "copy") == 0 || std::strcmp(what, "kernel") == 0;
}

void read_setting(const char *name, uint64_t &value) {
    std::string variable = "KVFSIM_";
    for (const char *c = name; *c; ++c)
        variable += static_cast<char>(std::toupper(static_cast<unsigned char>(*c)));
    if (const char *text = std::getenv(variable.c_str())) value = std::strtoull(text, nullptr, 0);
}

[[noreturn]] void refuse(const char *variable, const std::string &rule) {
    std::fprintf(stderr, "simulated_cuda: %s: \"%s\" is not understood\n", variable, rule.c_str());
    std::abort();
}

// Rules of an environment variable: what:nth, or what:nth:error, each with + for forever.
void read_rules(Driver &d, const char *variable, bool hold) {
    const char *text = std::getenv(variable);
    std::string rest = text ? text : "";
    while (!rest.empty()) {
        const size_t comma = std::min(rest.find(','), rest.size());
        const std::string one = rest.substr(0, comma);
        rest.erase(0, comma + 1);
        Rule rule;
        rule.hold = hold;
        rule.forever = one.back() == '+';
        const size_t colon = one.find(':');
        if (colon == std::string::npos) refuse(variable, one);
        rule.what = one.substr(0, colon);
        char *end = nullptr;
        rule.left = std::strtoull(one.c_str() + colon + 1, &end, 10);
        if (!hold) {
            if (*end != ':') refuse(variable, one);
            rule.error = static_cast<int>(std::strtol(end + 1, &end, 10));
        }
        const bool known =
            is_execution(rule.what.c_str()) || (!hold && find_entry_point(rule.what.c_str()) >= 0);
        if (!known || rule.left == 0) refuse(variable, one);
        d.rules.push_back(rule);
    }
    d.rule_count = d.rules.size();
}

void read_environment(Driver &d) {
    d.settings = {};
#define READ(name, value, text) read_setting(#name, d.settings.name);
    KVFSIM_SETTINGS(READ)
#undef READ
    d.settings.devices = std::min<uint64_t>(d.settings.devices, kDevices);
    d.rules.clear();
    read_rules(d, "KVFSIM_FAIL", false);
    read_rules(d, "KVFSIM_HOLD", true);
}

// Counts this occasion for the rules of its name. True if one applies.
bool take_rule(const char *what, const char *alias, bool hold, int *error) {
    Driver &d = driver();
    bool found = false;
    for (Rule &rule : d.rules) {
        if (rule.hold != hold || (rule.what != what && rule.what != alias)) continue;
        if (rule.left > 1) {
            --rule.left;
        } else if (rule.left == 1 && !found) {
            found = true;
            *error = rule.error;
            if (!rule.forever) rule.left = 0;
        }
    }
    std::erase_if(d.rules, [](const Rule &rule) { return rule.left == 0; });
    d.rule_count = d.rules.size();
    return found;
}

int add_rule(const char *what, uint64_t nth, int error, int forever, bool hold) {
    if (nth == 0 || (!is_execution(what) && (hold || find_entry_point(what) < 0))) return -1;
    Driver &d = driver();
    Lock lock(d.mutex);
    d.rules.push_back({what, nth, error, forever != 0, hold});
    d.rule_count = d.rules.size();
    return 0;
}

} // namespace

Driver::Driver() { read_environment(*this); }

Driver &driver() {
    // Never destroyed: streams' threads may outlive static destructors.
    static Driver *instance = [] {
        pthread_atfork(nullptr, nullptr, [] { driver().forked = driver().initialized.load(); });
        return new Driver;
    }();
    return *instance;
}

uint64_t now_ns() {
    return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(
                                     std::chrono::steady_clock::now().time_since_epoch())
                                     .count());
}

CUresult injected_error(const char *what, const char *alias) {
    int error = 0;
    return take_rule(what, alias, false, &error) ? static_cast<CUresult>(error) : CUDA_SUCCESS;
}

bool injected_hold(const char *what) {
    int error = 0;
    return take_rule(what, what, true, &error);
}

thread_local CUstreamCaptureMode capture_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

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

void break_context(Context &context, CUresult error) {
    if (context.error) return;
    context.error = error;
    if (error != CUDA_ERROR_CONTEXT_IS_DESTROYED) ++driver().counters.sticky_errors;
    driver().progress.notify_all();
}

} // namespace simulated

using namespace simulated;

extern "C" {

int kvfsim_set(const char *setting, uint64_t value) {
    Driver &d = driver();
    Lock lock(d.mutex);
#define SET(name, initial, text)                                                                   \
    if (std::strcmp(setting, #name) == 0) {                                                        \
        d.settings.name = value;                                                                   \
        d.settings.devices = std::min<uint64_t>(d.settings.devices, kDevices);                     \
        return 0;                                                                                  \
    }
    KVFSIM_SETTINGS(SET)
#undef SET
    return -1;
}

void kvfsim_reset(void) {
    Driver &d = driver();
    Lock lock(d.mutex);
    read_environment(d);
    ++d.released;
    d.lost = {};
    d.capturing = false;
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
    d.progress.notify_all();
}

int kvfsim_fail(const char *what, uint64_t nth, int error, int forever) {
    return add_rule(what, nth, error, forever, false);
}

int kvfsim_hold(const char *what, uint64_t nth, int forever) {
    return add_rule(what, nth, 0, forever, true);
}

void kvfsim_release(void) {
    Driver &d = driver();
    Lock lock(d.mutex);
    std::erase_if(d.rules, [](const Rule &rule) { return rule.hold; });
    d.rule_count = d.rules.size();
    ++d.released;
    d.progress.notify_all();
}

int kvfsim_wait_held(uint64_t count, uint32_t timeout_ms) {
    Driver &d = driver();
    Lock lock(d.mutex);
    return d.progress.wait_for(lock, std::chrono::milliseconds(timeout_ms),
                               [&] { return d.counters.held >= count; });
}

int kvfsim_lose_device(int device, int error, int permanent) {
    Driver &d = driver();
    Lock lock(d.mutex);
    if (device < 0 || static_cast<uint64_t>(device) >= d.settings.devices) return -1;
    if (permanent) d.lost[static_cast<size_t>(device)] = static_cast<CUresult>(error);
    if (d.primary[static_cast<size_t>(device)])
        break_context(*d.primary[static_cast<size_t>(device)], static_cast<CUresult>(error));
    return 0;
}

void kvfsim_begin_capture(void) { driver().capturing = true; }
void kvfsim_end_capture(void) { driver().capturing = false; }

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

int kvfsim_write(uint64_t address, const void *from, uint64_t bytes) {
    Lock lock(driver().mutex);
    std::byte *to = View().device(address, bytes, -1);
    if (!to) return -1;
    std::memcpy(to, from, bytes);
    return 0;
}

int kvfsim_read(void *to, uint64_t address, uint64_t bytes) {
    Lock lock(driver().mutex);
    const std::byte *from = View().device(address, bytes, -1);
    if (!from) return -1;
    std::memcpy(to, from, bytes);
    return 0;
}

} // extern "C"
