#include "core/checksum.h"

#include <bit>
#include <cstring>

namespace kvf {
namespace {

constexpr uint64_t kPrime1 = 0x9E3779B185EBCA87u;
constexpr uint64_t kPrime2 = 0xC2B2AE3D27D4EB4Fu;
constexpr uint64_t kPrime3 = 0x165667B19E3779F9u;
constexpr uint64_t kPrime4 = 0x85EBCA77C2B2AE63u;
constexpr uint64_t kPrime5 = 0x27D4EB2F165667C5u;

template <class T>
T read(const unsigned char *at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

uint64_t round(uint64_t lane, uint64_t input) {
    return std::rotl(lane + input * kPrime2, 31) * kPrime1;
}

uint64_t merge(uint64_t hash, uint64_t lane) { return (hash ^ round(0, lane)) * kPrime1 + kPrime4; }

} // namespace

uint64_t checksum(const void *data, uint64_t bytes) {
    const auto *at = static_cast<const unsigned char *>(data);
    const unsigned char *const end = at + bytes;
    uint64_t hash = kPrime5;
    if (bytes >= 32) {
        uint64_t lanes[] = {kPrime1 + kPrime2, kPrime2, 0, -kPrime1};
        for (; end - at >= 32; at += 32) {
            for (int i = 0; i < 4; ++i) lanes[i] = round(lanes[i], read<uint64_t>(at + 8 * i));
        }
        hash = std::rotl(lanes[0], 1) + std::rotl(lanes[1], 7) + std::rotl(lanes[2], 12) +
               std::rotl(lanes[3], 18);
        for (const uint64_t lane : lanes) hash = merge(hash, lane);
    }
    hash += bytes;
    for (; end - at >= 8; at += 8) {
        hash = std::rotl(hash ^ round(0, read<uint64_t>(at)), 27) * kPrime1 + kPrime4;
    }
    if (end - at >= 4) {
        hash = std::rotl(hash ^ read<uint32_t>(at) * kPrime1, 23) * kPrime2 + kPrime3;
        at += 4;
    }
    for (; at < end; ++at) hash = std::rotl(hash ^ *at * kPrime5, 11) * kPrime1;
    hash = (hash ^ hash >> 33) * kPrime2;
    hash = (hash ^ hash >> 29) * kPrime3;
    return hash ^ hash >> 32;
}

} // namespace kvf
