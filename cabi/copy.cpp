#include "copy.h"

#include <cstring>

namespace kvf {
namespace {

void copy(uint64_t address, unsigned char *place, uint64_t bytes, Direction direction) {
    auto *memory = reinterpret_cast<unsigned char *>(address);
    if (direction == Direction::Save) {
        std::memcpy(place, memory, bytes);
    } else {
        std::memcpy(memory, place, bytes);
    }
}

// Rows of a width that is known to the compiler: V-transposed caches whose sequences are interleaved
// have rows of one element, and a call of memcpy for each would cost more than the copy.
template <uint64_t width>
void copy_narrow(const kvf_region &block, unsigned char *place, Direction direction) {
    auto *memory = reinterpret_cast<unsigned char *>(block.address);
    if (direction == Direction::Save) {
        for (uint64_t i = 0; i < block.rows; ++i) {
            std::memcpy(place + i * block.buffer_pitch, memory + i * block.pitch, width);
        }
    } else {
        for (uint64_t i = 0; i < block.rows; ++i) {
            std::memcpy(memory + i * block.pitch, place + i * block.buffer_pitch, width);
        }
    }
}

void copy_block(const kvf_region &block, unsigned char *place, Direction direction) {
    switch (block.width) {
    case 1: return copy_narrow<1>(block, place, direction);
    case 2: return copy_narrow<2>(block, place, direction);
    case 4: return copy_narrow<4>(block, place, direction);
    case 8: return copy_narrow<8>(block, place, direction);
    case 16: return copy_narrow<16>(block, place, direction);
    default:
        for (uint64_t i = 0; i < block.rows; ++i) {
            copy(block.address + i * block.pitch, place + i * block.buffer_pitch, block.width,
                 direction);
        }
    }
}

} // namespace

void copy_piece(const Piece &piece, unsigned char *buffer, Direction direction) {
    if (!piece.runs) return copy_block(piece.block, buffer + piece.block.offset, direction);
    for (uint64_t i = 0; i < piece.count; ++i) {
        const Run run = piece.run(i);
        copy(run.address, buffer + run.offset, run.bytes, direction);
    }
}

void copy_packed(const Piece &piece, unsigned char *packed, unsigned char *buffer,
                 Direction direction) {
    auto at = reinterpret_cast<uint64_t>(packed);
    if (!piece.runs) {
        kvf_region block = piece.block;
        block.address = at;
        block.pitch = block.width;
        return copy_block(block, buffer + block.offset, direction);
    }
    for (uint64_t i = 0; i < piece.count; ++i) {
        const Run run = piece.run(i);
        copy(at, buffer + run.offset, run.bytes, direction);
        at += run.bytes;
    }
}

} // namespace kvf
