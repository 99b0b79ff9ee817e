// Reads the cells of a state whose structure is known.
#pragma once

#include "states/formats.h"

namespace kvf {

// Returns the position of a cell of the section `index`.
int32_t position_of_cell(const Structure &structure, size_t index, const StateView &state,
                         uint64_t cell);

// Copies the metadata of a state, which is all but its tensor bytes, from the state's byte `from`
// on to `memory + to`.
void copy_metadata(const Structure &structure, const StateView &state, unsigned char *memory,
                   uint64_t from, uint64_t to);

// Whether each attention section has no other positions than the first one. In a state of libllama
// this is so, whatever has been removed, shifted or copied: the cells of the first section keep
// every token of a sequence, and a window keeps some of these tokens. (A recurrent cell need not be
// at the last of these positions: llama_memory_seq_cp() of a part of a sequence copies that part of
// the attention cells, and the recurrent cell as it is.)
bool positions_agree(const Structure &structure, const StateView &state);

// A range of bytes of a state.
struct ByteRange {
    uint64_t begin, end;
};

// Returns the tensor bytes of the cells that libllama may give to another sequence although the
// state has them, in the order of the state. A cell of a sliding window is free for other sequences
// as soon as the *next* token of its sequence will not see the cell. A state has the cell as long
// as the *last* token sees it. (See find_slot and state_write in llama-kv-cache.cpp, and
// is_masked_swa in llama-hparams.h. `window` is llama_model_n_swa().)
//
// A section that holds cells outside of any window keeps every token, and has no such cells. Of
// several attention sections the last one is the window's, whatever it holds: releases whose states
// have no frame (b8179, b8390) also write cells that no token sees any more. The kind of window is
// not public, so the result has the cells of all kinds.
std::vector<ByteRange> bytes_free_for_others(const Structure &structure, const StateView &state,
                                             int32_t window);

} // namespace kvf
