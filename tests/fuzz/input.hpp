// Numbers out of a fuzzer's bytes. At the end of the input they are all 0.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "check.hpp"

class Input {
public:
    Input(const uint8_t *data, size_t size) : data_(data), left_(size) {}

    bool at_end() const { return left_ == 0; }

    template <class T>
    T number() {
        T value{};
        const size_t n = left_ < sizeof value ? left_ : sizeof value;
        if (n == 0) return value; // where data_ may be NULL
        std::memcpy(&value, data_, n);
        data_ += n;
        left_ -= n;
        return value;
    }

    // 0 to below - 1
    uint64_t below(uint64_t below) { return number<uint32_t>() % below; }

    const uint8_t *rest() const { return data_; }
    size_t left() const { return left_; }

private:
    const uint8_t *data_;
    size_t left_;
};
