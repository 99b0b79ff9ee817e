// Blocks in buffers of their own, for the tests and the measurement of their transfers: metadata,
// and then the tensors' rows with libllama's 12 bytes between them.
#pragma once

#include "memory/layout_builder.h"

// How a sequence lies in its cache.
enum class Cells { Contiguous, InTurn, Transposed, AtRandom, InTurnInPart };

struct Blocks {
    Cells cells;
    uint64_t count, tensors; // blocks; tensors of a block, K before V
    uint64_t tokens;         // of a block
    uint64_t row;            // bytes of a cell in a tensor; a multiple of 2
    uint64_t metadata = 5000;
    uint64_t gap = 12;

    static constexpr uint64_t kSpread = 4; // cells of the cache for each of the sequence's

    uint64_t cache_cells() const { return count * tokens * kSpread; }
    uint64_t tensor_bytes() const { return cache_cells() * row; }
    uint64_t device_bytes() const { return tensors * tensor_bytes(); }
    uint64_t bytes() const { return count * tensors * tokens * row; } // without gaps
    uint64_t offset(uint64_t tensor) const { return metadata + tensor * (tokens * row + gap); }
    uint64_t buffer_bytes() const { return offset(tensors - 1) + tokens * row; }
    uint64_t gap_bytes() const { return count * (tensors - 1) * gap; }

    bool is_transposed(uint64_t tensor) const {
        return cells == Cells::Transposed && tensor >= tensors / 2;
    }
    // The cell of the sequence's token.
    uint64_t cell(uint64_t token) const {
        const uint64_t in_block = token % tokens;
        switch (cells) {
        case Cells::Contiguous:
        case Cells::Transposed: return token;
        case Cells::InTurn: return token * kSpread;
        case Cells::AtRandom: return token * kSpread + token * 2654435761u % 65536 % kSpread;
        case Cells::InTurnInPart:
            return in_block < tokens / 2 ? token * kSpread
                                         : token * kSpread + token * 2654435761u % 65536 % kSpread;
        }
        return 0;
    }

    // Calls add(address, offset in the block's buffer, bytes) for each fragment, as libllama names
    // them, and begin_tensor() before each tensor.
    template <class BeginTensor, class Add>
    void for_each_fragment(uint64_t block, uint64_t address, BeginTensor &&begin_tensor,
                           Add &&add) const {
        for (uint64_t tensor = 0; tensor < tensors; ++tensor) {
            begin_tensor();
            const uint64_t begin = address + tensor * tensor_bytes();
            if (is_transposed(tensor)) {
                constexpr uint64_t kElement = 2;
                for (uint64_t i = 0; i < row / kElement; ++i) {
                    add(begin + (i * cache_cells() + block * tokens) * kElement,
                        offset(tensor) + i * tokens * kElement, tokens * kElement);
                }
                continue;
            }
            for (uint64_t token = 0; token < tokens; ++token) {
                add(begin + cell(block * tokens + token) * row, offset(tensor) + token * row, row);
            }
        }
    }

    // Of a block whose buffer begins `distance` bytes behind the job's.
    kvf::Layout layout(uint64_t block, uint64_t address, uint64_t distance, bool owns_gaps) const {
        kvf::LayoutBuilder builder;
        for_each_fragment(
            block, address, [&] { builder.begin_tensor(); },
            [&](uint64_t from, uint64_t offset, uint64_t bytes) {
                builder.add(from, distance + offset, bytes);
            });
        kvf::Layout layout = builder.finish();
        layout.owns_gaps = owns_gaps;
        return layout;
    }
};
