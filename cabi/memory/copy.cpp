#include "memory/copy.h"

#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace kvf {
namespace {

// From here on a copy goes past the caches: it would displace what decoding wants of them, and
// first read what it is to overwrite. (memcpy does the same, but only from sizes on that pieces
// never have: 13.5 GB/s against 10.0 on this project's development machine.)
constexpr uint64_t kStreaming = 256 << 10;

void copy_long(unsigned char *to, const unsigned char *from, uint64_t bytes) {
#if defined(__SSE2__)
    const uint64_t head = -reinterpret_cast<uint64_t>(to) % 64;
    std::memcpy(to, from, head);
    to += head;
    from += head;
    bytes -= head;
    for (; bytes >= 64; to += 64, from += 64, bytes -= 64) {
        const auto *source = reinterpret_cast<const __m128i *>(from);
        auto *target = reinterpret_cast<__m128i *>(to);
        const __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1);
        const __m128i c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
        _mm_stream_si128(target, a);
        _mm_stream_si128(target + 1, b);
        _mm_stream_si128(target + 2, c);
        _mm_stream_si128(target + 3, d);
    }
    _mm_sfence(); // what is written this way is seen by others only from here on
#endif
    std::memcpy(to, from, bytes);
}

// Whether what is written is read again at once, and had better stay in the caches.
enum class Next { Elsewhere, Reads };

void copy(uint64_t address, unsigned char *place, uint64_t bytes, Direction direction, Next next) {
    auto *memory = reinterpret_cast<unsigned char *>(address);
    unsigned char *const to = direction == Direction::Save ? place : memory;
    const unsigned char *const from = direction == Direction::Save ? memory : place;
    if (bytes >= kStreaming && next == Next::Elsewhere) return copy_long(to, from, bytes);
    std::memcpy(to, from, bytes);
}

// Rows of a width that is known to the compiler: V-transposed caches whose sequences are
// interleaved have rows of one element, and a call of memcpy for each would cost more than the
// copy.
template <uint64_t width>
void copy_narrow(const kvf_region &region, unsigned char *place, Direction direction) {
    auto *memory = reinterpret_cast<unsigned char *>(region.address);
    if (direction == Direction::Save) {
        for (uint64_t i = 0; i < region.rows; ++i) {
            std::memcpy(place + i * region.buffer_pitch, memory + i * region.pitch, width);
        }
    } else {
        for (uint64_t i = 0; i < region.rows; ++i) {
            std::memcpy(memory + i * region.pitch, place + i * region.buffer_pitch, width);
        }
    }
}

void copy_region(const kvf_region &region, unsigned char *place, Direction direction, Next next) {
    switch (region.width) {
    case 1: return copy_narrow<1>(region, place, direction);
    case 2: return copy_narrow<2>(region, place, direction);
    case 4: return copy_narrow<4>(region, place, direction);
    case 8: return copy_narrow<8>(region, place, direction);
    case 16: return copy_narrow<16>(region, place, direction);
    default:
        for (uint64_t i = 0; i < region.rows; ++i) {
            copy(region.address + i * region.pitch, place + i * region.buffer_pitch, region.width,
                 direction, next);
        }
    }
}

} // namespace

void copy_piece(const Piece &piece, unsigned char *buffer, Direction direction) {
    if (!piece.runs) {
        return copy_region(piece.region, buffer + piece.region.offset, direction, Next::Elsewhere);
    }
    for (uint64_t i = 0; i < piece.count; ++i) {
        const Run run = piece.run(i);
        copy(run.address, buffer + run.offset, run.bytes, direction, Next::Elsewhere);
    }
}

void copy_packed(const Piece &piece, unsigned char *packed, unsigned char *buffer,
                 Direction direction) {
    // A device reads what a load packs: from the caches, if it is there (beside an H200, 26 ms
    // instead of 35 for a pageable gigabyte).
    const Next next = direction == Direction::Load ? Next::Reads : Next::Elsewhere;
    auto at = reinterpret_cast<uint64_t>(packed);
    if (!piece.runs) {
        kvf_region region = piece.region;
        region.address = at;
        region.pitch = region.width;
        return copy_region(region, buffer + region.offset, direction, next);
    }
    for (uint64_t i = 0; i < piece.count; ++i) {
        const Run run = piece.run(i);
        copy(at, buffer + run.offset, run.bytes, direction, next);
        at += run.bytes;
    }
}

} // namespace kvf
