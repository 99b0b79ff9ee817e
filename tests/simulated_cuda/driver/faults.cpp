// Rules that make the nth occasion of something fail or be held; and devices that are lost.
#include "faults.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "contexts.h"
#include "entry.h"

namespace simulated {
namespace {

bool is_execution(const char *what) {
    return std::strcmp(what, "copy") == 0 || std::strcmp(what, "kernel") == 0;
}

[[noreturn]] void refuse(const char *variable, const std::string &rule) {
    std::fprintf(stderr, "simulated_cuda: %s: \"%s\" is not understood\n", variable, rule.c_str());
    std::abort();
}

// Adds the rules of an environment variable, which are separated by commas: what:nth for a hold,
// what:nth:error for a fault. A + at the end of a rule means: and all later occasions.
void add_rules(Driver &d, const char *variable, bool hold) {
    const char *text = std::getenv(variable);
    std::string rest = text ? text : "";
    while (!rest.empty()) {
        const size_t comma = std::min(rest.find(','), rest.size());
        const std::string text_of_rule = rest.substr(0, comma);
        rest.erase(0, comma + 1);
        Rule rule;
        rule.hold = hold;
        rule.forever = text_of_rule.back() == '+';
        const size_t colon = text_of_rule.find(':');
        if (colon == std::string::npos) refuse(variable, text_of_rule);
        rule.what = text_of_rule.substr(0, colon);
        char *end = nullptr;
        rule.left = std::strtoull(text_of_rule.c_str() + colon + 1, &end, 10);
        if (!hold) {
            if (*end != ':') refuse(variable, text_of_rule);
            rule.error = static_cast<int>(std::strtol(end + 1, &end, 10));
        }
        const bool known =
            is_execution(rule.what.c_str()) || (!hold && find_entry_point(rule.what.c_str()) >= 0);
        if (!known || rule.left == 0) refuse(variable, text_of_rule);
        d.rules.push_back(rule);
    }
    d.rule_count = d.rules.size();
}

// Counts this occasion for the rules of its name. Returns true if one of them applies.
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

void read_rules(Driver &d) {
    d.rules.clear();
    add_rules(d, "KVFSIM_FAIL", false);
    add_rules(d, "KVFSIM_HOLD", true);
}

CUresult injected_error(const char *what, const char *alias) {
    int error = 0;
    return take_rule(what, alias, false, &error) ? static_cast<CUresult>(error) : CUDA_SUCCESS;
}

bool injected_hold(const char *what) {
    int error = 0;
    return take_rule(what, what, true, &error);
}

} // namespace simulated

using namespace simulated;

extern "C" {

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
    if (!d.has_device(device)) return -1;
    if (permanent) d.lost[static_cast<size_t>(device)] = static_cast<CUresult>(error);
    if (d.primary[static_cast<size_t>(device)])
        break_context(*d.primary[static_cast<size_t>(device)], static_cast<CUresult>(error));
    return 0;
}

} // extern "C"
