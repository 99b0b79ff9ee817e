// What the cells of a state tell, once its structure is known.
#pragma once

#include "states/formats.h"

namespace kvf {

// The position of a cell of a section, which `index` names.
int32_t position_of_cell(const Structure &structure, size_t index, const StateView &state,
                         uint64_t cell);

// Copies what stands around the tensor bytes of a state, from its byte `from` on, to `memory + to`.
void copy_metadata(const Structure &structure, const StateView &state, unsigned char *memory,
                   uint64_t from, uint64_t to);

// Whether each attention section has no other positions than the first one. libllama keeps every
// token of a sequence in the cells of the first, and of a window it removes some: so do its states,
// whatever has been removed, shifted or copied. (It does not keep recurrent cells at the last of
// these positions: llama_memory_seq_cp() of a part of a sequence copies that part of the attention
// cells, and the recurrent cell as it is.)
bool positions_agree(const Structure &structure, const StateView &state);

// A range of bytes of a state.
struct ByteRange {
    uint64_t begin, end;
};

// The tensor bytes of those cells that libllama may give to another sequence although the state has
// them, in the order of the state. A cell of a sliding window is free for others as soon as the
// *next* token of its sequence will not see it; a state still has it while the *last* token does.
// (find_slot and state_write in llama-kv-cache.cpp, is_masked_swa in llama-hparams.h; `window` is
// llama_model_n_swa().) A section that holds cells outside of any window keeps every token, and has
// none; but of several attention sections the last is the window's. Releases whose states have no
// frame write into it also what no token sees any more (b8179, b8390). The kind of window is not
// public, so cells are named for all kinds.
std::vector<ByteRange> bytes_free_for_others(const Structure &structure, const StateView &state,
                                             int32_t window);

} // namespace kvf
