// Settings, from the environment and from kvfsim_set(); and the state that they belong to.
#include <pthread.h>

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <string>

#include "counters.h"
#include "faults.h"

namespace simulated {
namespace {

void read_setting(const char *name, uint64_t &value) {
    std::string variable = "KVFSIM_";
    for (const char *c = name; *c; ++c)
        variable += static_cast<char>(std::toupper(static_cast<unsigned char>(*c)));
    if (const char *text = std::getenv(variable.c_str())) value = std::strtoull(text, nullptr, 0);
}

void read_environment(Driver &d) {
    d.settings = {};
#define READ(name, value, text) read_setting(#name, d.settings.name);
    KVFSIM_SETTINGS(READ)
#undef READ
    d.settings.devices = std::min<uint64_t>(d.settings.devices, kDevices);
    read_rules(d);
}

} // namespace

Driver &driver() {
    static Driver *instance = [] {
        pthread_atfork(nullptr, nullptr, [] { driver().forked = driver().initialized.load(); });
        auto *made = new Driver;
        read_environment(*made);
        return made;
    }();
    return *instance;
}

uint64_t now_ns() {
    return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(
                                     std::chrono::steady_clock::now().time_since_epoch())
                                     .count());
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
    reset_counters();
    d.progress.notify_all();
}

} // extern "C"
