// Blocks and checkpoints as bytes: a state is cut into blocks, and blocks are joined to a state.
// What is written here is the metadata; where the tensor bytes belong, a BlockMap says.
#pragma once

#include <span>

#include "core/status.h"
#include "states/block_map.h"
#include "states/formats.h"

namespace kvf {

class StateWriter;

// The first `parts` sections of a cache, which keep every token; and the others.
Structure parts_in_blocks(const Structure &structure, size_t parts);
Structure parts_in_checkpoint(const Structure &structure, size_t parts);

// Throws KVF_ERR_INVALID_ARGUMENT where blocks are empty, misordered or overlap; `no_gaps`: or
// where one does not begin where the one before it ends.
void check_ranges(std::span<const kvf_block> blocks, bool no_gaps);

// The size of a block of so many cells.
uint64_t block_bytes(const Structure &parts, uint64_t cells);

// A whole state, cut. Blocks hold the cells at their positions in the order of the state.
class StateCut {
public:
    // `whole` describes `state`, whose first `parts` sections are cut. Throws
    // KVF_ERR_SEQUENCE_EMPTY where there is no cell at the positions of a block.
    StateCut(const Structure &whole, const StateView &state, size_t parts,
             std::span<const kvf_block> blocks);

    // Sets the `bytes` of each block to what it needs. Returns whether all buffers have room; a
    // block without a buffer needs none.
    bool set_sizes(std::span<kvf_block> blocks) const;
    // Writes the metadata of each block into its buffer, which has room, as libllama would for
    // `sequence`.
    void write(std::span<const kvf_block> blocks, int32_t sequence) const;
    // For the tensor bytes of the sections that were cut.
    BlockMap map() const;

private:
    std::vector<Structure> lay_out(std::span<const kvf_block> blocks, int32_t sequence,
                                   bool write) const;

    const Structure whole_;
    const StateView state_;
    const size_t parts_;
    std::vector<std::vector<CellRun>> runs_;      // by section
    std::vector<std::vector<uint64_t>> in_block_; // by section and block: cells
    std::vector<Structure> structures_;           // of the blocks
};

// Blocks, and perhaps a checkpoint, looked at: what a state of them looks like.
class StateJoin {
public:
    // `like`: what states of the cache look like; NULL: not known. `parts`: how many of its
    // sections blocks hold; 0: as many as the blocks have. `last_position`: as of StateView. Throws
    // KVF_ERR_STATE_DAMAGED or KVF_ERR_STATE_MISMATCH, and KVF_ERR_UNSUPPORTED where several
    // formats describe all that is given, and the state depends on which one is meant.
    StateJoin(const Structure *like, size_t parts, std::span<const kvf_block> blocks,
              const void *checkpoint, uint64_t checkpoint_bytes, int32_t last_position);

    uint64_t bytes() const { return joined_.bytes; } // of the state
    // Writes the state's metadata into `memory`, which has bytes().
    void write(unsigned char *memory) const { lay_out(memory); }
    // For all tensor bytes of the state. The checkpoint counts as the block behind the last.
    BlockMap map() const;

private:
    void read(const Structure &known, const Structure *rest, size_t parts);
    void read_in_the_only_way(const std::vector<Structure> &ways, size_t parts);
    bool makes_same_state_as(const StateJoin &other) const;
    void check_block(size_t index, const kvf_block &block) const;
    void check_checkpoint(const Structure &rest) const;
    Structure lay_out(unsigned char *memory) const;
    Structure lay_out_blocks(StateWriter &out) const;

    std::span<const kvf_block> blocks_;
    std::vector<StateView> views_;
    std::vector<Structure> structures_; // of the blocks
    StateView checkpoint_{};            // its `data` is NULL where there is none
    std::optional<Structure> rest_;     // of the checkpoint
    Structure joined_;
};

// kvf_state_cut() and kvf_state_join().
void cut_state(const StateView &state, size_t parts, std::span<kvf_block> blocks, void *checkpoint,
               uint64_t *checkpoint_bytes);
void join_state(std::span<const kvf_block> blocks, const void *checkpoint,
                uint64_t checkpoint_bytes, size_t parts, void *state, uint64_t *state_bytes);

} // namespace kvf
