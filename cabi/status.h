// The one error type inside the library, and the way it leaves through the C ABI.
#pragma once

#include <cstdint>
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
};

// "name: detail", or the status's own text where there is no detail.
std::string describe(const Error &error);

// Copies `text` into a caller's buffer, cut to fit, always terminated. A NULL buffer is allowed.
void copy_text(const std::string &text, char *buffer, uint64_t capacity);

// printf into a string.
std::string format(const char *format, ...) __attribute__((format(printf, 1, 2)));

// Nanoseconds of CLOCK_MONOTONIC.
uint64_t now_ns();

} // namespace kvf
