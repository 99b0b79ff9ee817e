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

namespace {

struct StatusEntry {
    int32_t status;
    const char *name;
    const char *text;
};

// Every status of the header, with the text that stands there. tests/c/status.c holds one against
// the other.
constexpr StatusEntry kStatuses[] = {
#define KVF_ENTRY(status, text) {status, #status, text}
    KVF_ENTRY(KVF_OK, "success"),
    KVF_ENTRY(KVF_ERR_INVALID_ARGUMENT, "invalid argument"),
    KVF_ENTRY(KVF_ERR_INVALID_HANDLE, "unknown handle, or its object has been destroyed"),
    KVF_ENTRY(KVF_ERR_STRUCT_SIZE, "a struct has a wrong size, or unknown fields are set"),
    KVF_ENTRY(KVF_ERR_OUT_OF_MEMORY, "out of memory"),
    KVF_ENTRY(KVF_ERR_PINNED_LIMIT, "the engine's limit of pinned memory is reached"),
    KVF_ENTRY(KVF_ERR_BUFFER_TOO_SMALL, "the buffer is too small"),
    KVF_ENTRY(KVF_ERR_BUSY, "in use by a job in flight or by another object"),
    KVF_ENTRY(KVF_ERR_CLOSED, "the engine is closing"),
    KVF_ENTRY(KVF_ERR_CANCELLED, "the job was cancelled"),
    KVF_ENTRY(KVF_ERR_TIMEOUT, "timed out"),
    KVF_ENTRY(KVF_ERR_FORKED, "the handle was made before fork() in the parent process"),
    KVF_ENTRY(KVF_ERR_UNSUPPORTED, "not supported here"),
    KVF_ENTRY(KVF_ERR_NO_DEVICE, "no such device"),
    KVF_ENTRY(KVF_ERR_DEVICE, "the device reported an error"),
    KVF_ENTRY(KVF_ERR_DEVICE_LOST, "a device is lost: make a new engine"),
    KVF_ENTRY(KVF_ERR_UNREACHABLE, "memory that no device of the engine can reach"),
    KVF_ENTRY(KVF_ERR_SYSTEM, "the operating system refused"),
    KVF_ENTRY(KVF_ERR_LIBRARY_NOT_FOUND, "no libllama is loaded in this process"),
    KVF_ENTRY(KVF_ERR_LIBRARY_AMBIGUOUS, "several libllama are loaded: name one"),
    KVF_ENTRY(KVF_ERR_TAP, "libllama's calls cannot be recorded"),
    KVF_ENTRY(KVF_ERR_CONTEXT_FREED, "the llama_context has been freed"),
    KVF_ENTRY(KVF_ERR_SEQUENCE_RANGE, "sequence id out of the context's range"),
    KVF_ENTRY(KVF_ERR_SEQUENCE_EMPTY, "the sequence is empty"),
    KVF_ENTRY(KVF_ERR_STATE_DAMAGED, "the state is truncated or its structure is damaged"),
    KVF_ENTRY(KVF_ERR_STATE_MISMATCH, "the state is of another model or another kind of cache"),
    KVF_ENTRY(KVF_ERR_CACHE_FULL, "the cache has not enough free cells"),
    KVF_ENTRY(KVF_ERR_LLAMA, "libllama refused"),
    KVF_ENTRY(KVF_ERR_INTERNAL, "internal error"),
#undef KVF_ENTRY
};

// The entry of a status; NULL for a number that is none.
const StatusEntry *find_status(int32_t status) {
    for (const StatusEntry &entry : kStatuses) {
        if (entry.status == status) return &entry;
    }
    return nullptr;
}

} // namespace
} // namespace kvf

extern "C" {

const char *kvf_status_name(int32_t status) {
    const auto *entry = kvf::find_status(status);
    return entry ? entry->name : "KVF_?";
}

const char *kvf_strerror(int32_t status) {
    const auto *entry = kvf::find_status(status);
    return entry ? entry->text : "unknown status";
}

} // extern "C"
