// States out of a fuzzer's bytes, and damage to them.
#pragma once

#include <algorithm>
#include <vector>

#include "input.hpp"
#include "state_builder.hpp"

inline StateBuilder any_state(Input &input) {
    StateBuilder state({.framed = input.below(4) > 0,
                        .cell_words = static_cast<uint32_t>(input.below(4)),
                        .rotation_words = 2 * static_cast<uint32_t>(input.below(2))});
    for (uint64_t sections = input.below(4); sections > 0; --sections) {
        StateBuilder::Attention a;
        a.streams = 1 + static_cast<uint32_t>(input.below(3));
        a.stream = static_cast<uint32_t>(input.below(a.streams));
        a.cells = static_cast<uint32_t>(input.below(6));
        a.layers = static_cast<uint32_t>(input.below(4));
        a.type = static_cast<int32_t>(input.below(40));
        a.row = 2 * static_cast<uint32_t>(input.below(40));
        a.transposed = input.below(2);
        a.values = input.below(2);
        state.attention(a);
    }
    if (input.below(2)) {
        StateBuilder::Recurrent r;
        r.cells = static_cast<uint32_t>(input.below(2));
        r.layers = 1 + static_cast<uint32_t>(input.below(4));
        r.layers_with_r = static_cast<uint32_t>(input.below(r.layers + 1));
        r.layers_with_s = static_cast<uint32_t>(input.below(r.layers + 1));
        r.r = input.below(100);
        r.s = input.below(100);
        state.recurrent(r);
    }
    return state;
}

inline void damage(Input &input, std::vector<unsigned char> &bytes) {
    while (!input.at_end() && !bytes.empty()) {
        const size_t at = input.below(bytes.size());
        const uint32_t numbers[] = {0, 1, 2, 3, 0x7fffffff, 0x80000000, 0xffffffff, 0x55555556};
        switch (input.below(6)) {
        case 0: bytes[at] ^= static_cast<unsigned char>(1u << input.below(8)); break;
        case 1: bytes.resize(at); break;
        case 2: bytes.insert(bytes.begin() + static_cast<long>(at), input.number<uint8_t>()); break;
        case 3: bytes.erase(bytes.begin() + static_cast<long>(at)); break;
        case 4: {
            const size_t place = at / 4 * 4;
            const uint32_t number = numbers[input.below(8)];
            if (place + 4 <= bytes.size()) std::memcpy(&bytes[place], &number, 4);
            break;
        }
        default: { // a part of it once more
            const size_t n = std::min<size_t>(input.below(64), bytes.size() - at);
            const std::vector<unsigned char> part(bytes.begin() + static_cast<long>(at),
                                                  bytes.begin() + static_cast<long>(at + n));
            bytes.insert(bytes.end(), part.begin(), part.end());
        }
        }
    }
}
