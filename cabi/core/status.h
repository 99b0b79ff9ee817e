// The one error type inside the library, and the way it leaves through the C ABI.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <string>
#include <utility>

#include "kvferry.h"

namespace kvf {

// A status with, where more can be said, one line of detail. Thrown inside, never across the ABI.
struct Error {
    int32_t status;
    std::string detail;

    explicit Error(int32_t status, std::string detail = {})
        : status(status), detail(std::move(detail)) {}
    // Where there is no memory for the detail, the status must do: it is what callers act upon.
    Error(int32_t status, const char *detail) noexcept : status(status) {
        try {
            this->detail = detail;
        } catch (const std::bad_alloc &) {
        }
    }
};

// "name: detail", or the status's own text where there is no detail.
std::string describe(const Error &error);

// Copies `text` into a caller's buffer, cut to fit, always terminated. A NULL buffer is allowed.
void copy_text(const std::string &text, char *buffer, uint64_t capacity);

// Copies a struct to where a caller's version of it has `size` bytes: cut, or followed by zeros.
template <class Struct>
void copy_struct(const Struct &from, void *to, uint64_t size) {
    std::memcpy(to, &from, std::min<uint64_t>(size, sizeof from));
    if (size > sizeof from) {
        std::memset(static_cast<unsigned char *>(to) + sizeof from, 0, size - sizeof from);
    }
}

// printf into a string.
std::string format(const char *format, ...) __attribute__((format(printf, 1, 2)));

// A number of bytes as people read it, such as "600 MiB"; with one decimal where it is not whole.
std::string text_of_bytes(uint64_t bytes);

// Nanoseconds of CLOCK_MONOTONIC.
uint64_t now_ns();
// Nanoseconds: the whole seconds that an environment variable gives, or `fallback_ns` where it
// gives none.
uint64_t seconds_from_environment(const char *name, uint64_t fallback_ns);

// Callers may ask for timeouts that end after the clock does: those are cut to this, ten years.
constexpr int64_t kLongestTimeoutNs = INT64_C(10) * 365 * 24 * 3600 * 1'000'000'000;

} // namespace kvf
