// Blocks and checkpoints as bytes: a state is cut into blocks, and blocks are joined to a state.
// These classes write the metadata. A BlockMap says where the tensor bytes belong.
#pragma once

#include <span>

#include "core/status.h"
#include "states/block_map.h"
#include "states/formats.h"

namespace kvf {

class StateWriter;

// The first `parts` sections of a cache keep every token and go into blocks. The others go into a
// checkpoint.
Structure parts_in_blocks(const Structure &structure, size_t parts);
Structure parts_in_checkpoint(const Structure &structure, size_t parts);

// Throws KVF_ERR_INVALID_ARGUMENT if blocks are empty, misordered or overlap. With `no_gaps` also
// if a block does not begin where the block before it ends.
void check_ranges(std::span<const kvf_block> blocks, bool no_gaps);

// The size of a block of this many cells.
uint64_t block_bytes(const Structure &parts, uint64_t cells);

// Cuts a whole state into blocks. A block holds the cells at its positions, in the order of the
// state.
class StateCut {
public:
    // `whole` describes `state`, whose first `parts` sections are cut. Throws
    // KVF_ERR_SEQUENCE_EMPTY if the state has no cell at the positions of a block.
    StateCut(const Structure &whole, const StateView &state, size_t parts,
             std::span<const kvf_block> blocks);

    // Sets the `bytes` of each block to what it needs. Returns whether all buffers have room; a
    // block without a buffer needs none.
    bool set_sizes(std::span<kvf_block> blocks) const;
    // Writes the metadata of each block into its buffer, as libllama would write it for `sequence`.
    // The buffers must be large enough: set_sizes().
    void write(std::span<const kvf_block> blocks, int32_t sequence) const;
    // Returns the map of the tensor bytes of the sections that were cut.
    BlockMap map() const;

private:
    std::vector<Structure> lay_out(std::span<const kvf_block> blocks, int32_t sequence,
                                   bool write) const;

    const Structure whole_;
    const StateView state_;
    const size_t parts_;
    std::vector<std::vector<CellRun>> runs_;      // by section
    std::vector<std::vector<uint64_t>> in_block_; // by section and block: cells
    std::vector<Structure> structures_;           // by block
};

// Checks blocks, and perhaps a checkpoint, and finds the structure of the state that they make
// together.
class StateJoin {
public:
    // `like` is the structure of other states of the cache; NULL if none is known. `parts` is how
    // many of its sections blocks hold; 0 means as many as these blocks have. `last_position` is
    // that of StateView. The memory of the blocks and of the checkpoint must outlive this object.
    // Throws KVF_ERR_STATE_DAMAGED or KVF_ERR_STATE_MISMATCH, and KVF_ERR_UNSUPPORTED if several
    // formats describe all blocks and the checkpoint, and would make different states of them.
    StateJoin(const Structure *like, size_t parts, std::span<const kvf_block> blocks,
              const void *checkpoint, uint64_t checkpoint_bytes, int32_t last_position);

    uint64_t bytes() const { return joined_.bytes; } // of the state
    // Writes the state's metadata into `memory`, which has room for bytes().
    void write(unsigned char *memory) const { lay_out(memory); }
    // Returns the map of all tensor bytes of the state. The checkpoint counts as the block behind
    // the last one.
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
    std::vector<Structure> structures_; // by block
    StateView checkpoint_{};            // its `data` is NULL if there is no checkpoint
    std::optional<Structure> rest_;     // of the checkpoint
    Structure joined_;
};

// What kvf_state_cut() and kvf_state_join() do, on plain memory.
void cut_state(const StateView &state, size_t parts, std::span<kvf_block> blocks, void *checkpoint,
               uint64_t *checkpoint_bytes);
void join_state(std::span<const kvf_block> blocks, const void *checkpoint,
                uint64_t checkpoint_bytes, size_t parts, void *state, uint64_t *state_bytes);

} // namespace kvf
