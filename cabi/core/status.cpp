#include "core/status.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>

namespace kvf {

std::string describe(const Error &error) {
    const char *text = kvf_strerror(error.status);
    return error.detail.empty() ? text : std::string(text) + ": " + error.detail;
}

void copy_text(const std::string &text, char *buffer, uint64_t capacity) {
    if (!buffer || capacity == 0) return;
    const size_t n = std::min<size_t>(text.size(), capacity - 1);
    std::memcpy(buffer, text.data(), n);
    buffer[n] = 0;
}

std::string format(const char *format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    return text;
}

std::string text_of_bytes(uint64_t bytes) {
    constexpr const char *kUnits[] = {"bytes", "KiB", "MiB", "GiB", "TiB"};
    int unit = 0;
    double value = static_cast<double>(bytes);
    for (; value >= 1024 && unit < 4; ++unit) value /= 1024;
    const bool whole = value == static_cast<double>(static_cast<uint64_t>(value));
    return format("%.*f %s", whole ? 0 : 1, value, kUnits[unit]);
}

uint64_t now_ns() {
    timespec t{};
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<uint64_t>(t.tv_sec) * 1'000'000'000u + static_cast<uint64_t>(t.tv_nsec);
}

uint64_t seconds_from_environment(const char *name, uint64_t fallback_ns) {
    const char *seconds = std::getenv(name);
    const uint64_t given = seconds ? std::strtoull(seconds, nullptr, 10) : 0;
    return given ? given * 1'000'000'000 : fallback_ns;
}

} // namespace kvf

extern "C" {

const char *kvf_status_name(int32_t status) {
    switch (status) {
#define KVF_STATUS_NAME(name, value, text)                                                         \
    case value: return "KVF_" #name;
        KVF_STATUS_MAP(KVF_STATUS_NAME)
#undef KVF_STATUS_NAME
    default: return "KVF_?";
    }
}

const char *kvf_strerror(int32_t status) {
    switch (status) {
#define KVF_STATUS_TEXT(name, value, text)                                                         \
    case value: return text;
        KVF_STATUS_MAP(KVF_STATUS_TEXT)
#undef KVF_STATUS_TEXT
    default: return "unknown status";
    }
}

} // extern "C"
