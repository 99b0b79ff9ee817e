#include "states/blocks.h"

#include <algorithm>
#include <exception>
#include <map>

#include "states/cells.h"
#include "states/writer.h"

namespace kvf {
namespace {

int32_t sequence_of(const Structure &structure, const StateView &view) {
    int32_t sequence = 0;
    if (structure.framed) std::memcpy(&sequence, view.data + sizeof kStateMagic, sizeof sequence);
    return sequence;
}

// Copies the metadata of a cell. The copy belongs to `sequence`.
void copy_cell(StateWriter &out, const unsigned char *cell, const StateFormat &format,
               int32_t sequence) {
    out.copy(cell, cell_bytes(format) - sizeof sequence);
    out.add(sequence);
}

std::string name_of(size_t index, const kvf_block &block) {
    return format("block %zu (positions %d to %d)", index, block.begin, block.end - 1);
}

// Why a block cannot follow another one in a list; NULL if it can.
const char *why_not_behind(const kvf_block &block, const kvf_block &before, bool no_gaps) {
    if (block.begin < before.begin) return "comes before";
    if (block.begin < before.end) return "overlaps";
    if (no_gaps && block.begin > before.end) return "leaves a gap behind";
    return nullptr;
}

// Returns how many bytes a state has before its sections.
uint64_t frame_bytes(const Structure &structure) { return structure.framed ? kFrameBytes : 0; }

// Returns where the first `parts` sections of a whole state end.
uint64_t end_of_parts(const Structure &whole, size_t parts, const StateFormat &format) {
    StateWriter out(nullptr);
    write_frame(out, whole, 0);
    for (size_t i = 0; i < parts; ++i) {
        const Section &section = whole.sections[i];
        write_attention(out, section, section.cells,
                        [&](StateWriter &o, uint64_t) { o.skip(cell_bytes(format)); });
    }
    return out.at();
}

} // namespace

Structure parts_in_blocks(const Structure &structure, size_t parts) {
    Structure some = structure;
    some.sections.resize(parts);
    return some;
}

Structure parts_in_checkpoint(const Structure &structure, size_t parts) {
    Structure some = structure;
    some.sections.erase(some.sections.begin(),
                        some.sections.begin() + static_cast<ptrdiff_t>(parts));
    return some;
}

void check_ranges(std::span<const kvf_block> blocks, bool no_gaps) {
    for (size_t i = 0; i < blocks.size(); ++i) {
        const kvf_block &block = blocks[i];
        if (block.begin < 0 || block.end <= block.begin) {
            throw Error(
                KVF_ERR_INVALID_ARGUMENT,
                format("block %zu has no positions: begin %d, end %d", i, block.begin, block.end));
        }
        if (i == 0) continue;
        const char *const why = why_not_behind(block, blocks[i - 1], no_gaps);
        if (!why) continue;
        throw Error(KVF_ERR_INVALID_ARGUMENT,
                    name_of(i, block) + format(" %s block %zu", why, i - 1));
    }
}

uint64_t block_bytes(const Structure &parts, uint64_t cells) {
    StateWriter out(nullptr);
    write_frame(out, parts, 0);
    for (const Section &section : parts.sections) {
        write_attention(out, section, cells,
                        [&](StateWriter &o, uint64_t) { o.skip(cell_bytes(*parts.format)); });
    }
    return out.at();
}

// ---- A state is cut ----------------------------------------------------------------------------

StateCut::StateCut(const Structure &whole, const StateView &state, size_t parts,
                   std::span<const kvf_block> blocks)
    : whole_(whole), state_(state), parts_(parts) {
    for (size_t part = 0; part < parts; ++part) {
        std::vector<CellRun> runs;
        std::vector<uint64_t> in_block(blocks.size(), 0);
        for (uint64_t cell = 0; cell < whole.sections[part].cells; ++cell) {
            const int32_t position = position_of_cell(whole, part, state, cell);
            const auto block =
                std::partition_point(blocks.begin(), blocks.end(),
                                     [&](const kvf_block &one) { return one.end <= position; });
            if (block == blocks.end() || position < block->begin) continue;
            const auto index = static_cast<size_t>(block - blocks.begin());
            const uint64_t place = in_block[index]++;
            if (!runs.empty() && runs.back().block == index &&
                runs.back().first + runs.back().count == cell) {
                ++runs.back().count;
            } else {
                runs.push_back({cell, 1, index, place});
            }
        }
        const auto empty = std::find(in_block.begin(), in_block.end(), 0);
        if (empty != in_block.end()) {
            const auto index = static_cast<size_t>(empty - in_block.begin());
            throw Error(KVF_ERR_SEQUENCE_EMPTY, "no token for " + name_of(index, blocks[index]));
        }
        runs_.push_back(std::move(runs));
        in_block_.push_back(std::move(in_block));
    }
    structures_ = lay_out(blocks, 0, false);
}

// Returns the structure of each block, and writes the blocks' metadata if `write` is true.
std::vector<Structure> StateCut::lay_out(std::span<const kvf_block> blocks, int32_t sequence,
                                         bool write) const {
    // By section and block: the block's cells, in their order.
    std::vector<std::vector<std::vector<uint64_t>>> cells(
        parts_, std::vector<std::vector<uint64_t>>(blocks.size()));
    for (size_t part = 0; part < parts_; ++part) {
        for (const CellRun &run : runs_[part]) {
            for (uint64_t i = 0; i < run.count; ++i)
                cells[part][run.block].push_back(run.first + i);
        }
    }
    std::vector<Structure> structures;
    for (size_t i = 0; i < blocks.size(); ++i) {
        StateWriter out(write ? static_cast<unsigned char *>(blocks[i].buffer) : nullptr);
        Structure structure = parts_in_blocks(whole_, parts_);
        write_frame(out, whole_, sequence);
        for (size_t part = 0; part < parts_; ++part) {
            const Section &section = whole_.sections[part];
            const unsigned char *const from = state_.data + section.cells_at;
            const auto copy = [&](StateWriter &o, uint64_t cell) {
                copy_cell(o, from + cells[part][i][cell] * cell_bytes(*whole_.format),
                          *whole_.format, sequence);
            };
            structure.sections[part] = write_attention(out, section, in_block_[part][i], copy);
        }
        structure.tensor_bytes = 0;
        structure.bytes = out.at();
        structures.push_back(std::move(structure));
    }
    return structures;
}

bool StateCut::set_sizes(std::span<kvf_block> blocks) const {
    bool fits = true;
    for (size_t i = 0; i < blocks.size(); ++i) {
        const uint64_t needed = structures_[i].bytes;
        fits &= !blocks[i].buffer || blocks[i].bytes >= needed;
        blocks[i].bytes = needed;
    }
    return fits;
}

void StateCut::write(std::span<const kvf_block> blocks, int32_t sequence) const {
    lay_out(blocks, sequence, true);
}

BlockMap StateCut::map() const {
    BlockMap map;
    for (size_t part = 0; part < parts_; ++part) {
        std::vector<const Section *> sections;
        sections.reserve(structures_.size());
        for (const Structure &structure : structures_)
            sections.push_back(&structure.sections[part]);
        map.add_section(whole_.sections[part], sections, runs_[part]);
    }
    return map;
}

// ---- Blocks are joined -------------------------------------------------------------------------

namespace {

StateView view_of(const void *memory, uint64_t bytes, int32_t last_position) {
    return {static_cast<const unsigned char *>(memory), bytes, last_position};
}

// Whether a block can have this structure: it has attention alone, every section has cells, and
// there are `parts` sections (0: any number).
bool looks_like_block(const Structure &structure, size_t parts) {
    const bool attention = std::all_of(
        structure.sections.begin(), structure.sections.end(),
        [](const Section &section) { return section.kind == Section::Kind::Attention; });
    return attention && structure.has_cells_everywhere() &&
           (parts == 0 || structure.sections.size() == parts);
}

// Returns the error for a block that cannot be read as a block of the cache that `known` describes
// (NULL: nothing is known).
Error unreadable_block(const StateView &view, const Structure *known, const std::string &name) {
    const auto other = known ? parse_state(view) : std::nullopt;
    const std::string why = other ? mismatch(*other, *known) : "";
    if (!why.empty()) return Error(KVF_ERR_STATE_MISMATCH, name + ": " + why);
    return Error(KVF_ERR_STATE_DAMAGED, name);
}

// Returns every way to read a block of the cache that `known` describes (NULL: nothing is known):
// at least one.
std::vector<Structure> ways_to_read_block(const StateView &view, const Structure *known,
                                          size_t parts, const std::string &name) {
    auto found = parse_state_in_every_way(view, known);
    std::erase_if(found, [&](const Structure &one) { return !looks_like_block(one, parts); });
    if (found.empty()) throw unreadable_block(view, known, name);
    return found;
}

Structure read_block(const StateView &view, const Structure &known, size_t parts,
                     const std::string &name) {
    Structure block = std::move(ways_to_read_block(view, &known, parts, name).front());
    const std::string why = mismatch(block, known);
    if (!why.empty()) throw Error(KVF_ERR_STATE_MISMATCH, name + ": " + why);
    return block;
}

// Reads a checkpoint whose structure must be as `like` says (NULL: nothing is known). `format` is
// the format of the blocks (NULL: there are no blocks).
Structure read_rest(const StateView &view, const Structure *like, const StateFormat *format) {
    auto found = parse_state_in_every_way(view, like);
    if (found.empty()) throw Error(KVF_ERR_STATE_DAMAGED, "the checkpoint");
    // Recurrent sections, and windows without cells, have the same bytes in several formats.
    const auto same = std::find_if(found.begin(), found.end(), [&](const Structure &one) {
        return !format || !one.format || one.format == format;
    });
    if (same == found.end())
        throw Error(KVF_ERR_STATE_MISMATCH, "the checkpoint has another format than the blocks");
    return std::move(*same);
}

} // namespace

StateJoin::StateJoin(const Structure *like, size_t parts, std::span<const kvf_block> blocks,
                     const void *checkpoint, uint64_t checkpoint_bytes, int32_t last_position)
    : blocks_(blocks) {
    for (const kvf_block &block : blocks)
        views_.push_back(view_of(block.buffer, block.bytes, last_position));
    if (checkpoint) checkpoint_ = view_of(checkpoint, checkpoint_bytes, last_position);
    if (like && (parts || blocks.empty())) {
        const Structure known = parts_in_blocks(*like, parts);
        const Structure rest = parts_in_checkpoint(*like, parts);
        read(known, &rest, parts);
    } else if (blocks.empty()) {
        read(Structure(), nullptr, parts);
    } else {
        const std::string name = name_of(0, blocks.front());
        read_in_the_only_way(ways_to_read_block(views_.front(), nullptr, parts, name), parts);
    }
    joined_ = lay_out(nullptr);
}

// Reads all blocks and the checkpoint. `known` is the structure of the blocks, if there are any.
// `rest` is the structure of the checkpoint; NULL if it is not known.
void StateJoin::read(const Structure &known, const Structure *rest, size_t parts) {
    for (size_t i = 0; i < blocks_.size(); ++i) {
        structures_.push_back(read_block(views_[i], known, parts, name_of(i, blocks_[i])));
        check_block(i, blocks_[i]);
    }
    if (!checkpoint_.data) return;
    rest_ = read_rest(checkpoint_, rest, blocks_.empty() ? nullptr : structures_.front().format);
    if (!blocks_.empty()) check_checkpoint(*rest_);
}

// `ways` are the possible structures of the first block. Several formats describe a block of one
// cell without tensors. Then the other blocks and the checkpoint tell which format it has. If they
// do not, all of these formats must make the same state.
void StateJoin::read_in_the_only_way(const std::vector<Structure> &ways, size_t parts) {
    if (ways.size() == 1) return read(ways.front(), nullptr, parts);
    std::vector<StateJoin> joins;
    for (const Structure &way : ways) {
        StateJoin join(*this);
        try {
            join.read(way, nullptr, parts);
        } catch (const Error &) {
            continue;
        }
        join.joined_ = join.lay_out(nullptr);
        if (!joins.empty() && !joins.front().makes_same_state_as(join))
            throw Error(KVF_ERR_UNSUPPORTED, "several known formats describe the blocks");
        joins.push_back(std::move(join));
    }
    if (joins.empty()) return read(ways.front(), nullptr, parts); // throws once more
    *this = std::move(joins.front());
}

bool StateJoin::makes_same_state_as(const StateJoin &other) const {
    // Only blocks without tensors can be read in several formats.
    if (joined_.tensor_bytes || other.joined_.tensor_bytes || bytes() != other.bytes())
        return false;
    std::vector<unsigned char> ours(bytes());
    std::vector<unsigned char> theirs(bytes());
    write(ours.data());
    other.write(theirs.data());
    return ours == theirs;
}

// Each cell must have a position of the block. Positions may be missing, and may repeat: the
// patches of an image share a position, and llama_memory_seq_div() and _cp() make cells that share
// one.
void StateJoin::check_block(size_t index, const kvf_block &block) const {
    const Structure &structure = structures_[index];
    for (size_t part = 0; part < structure.sections.size(); ++part) {
        for (uint64_t cell = 0; cell < structure.sections[part].cells; ++cell) {
            const int32_t position = position_of_cell(structure, part, views_[index], cell);
            if (position >= block.begin && position < block.end) continue;
            throw Error(KVF_ERR_STATE_DAMAGED,
                        name_of(index, block) + format(" holds position %d", position));
        }
    }
}

// The windows and recurrent layers must be those at the end of the last block.
void StateJoin::check_checkpoint(const Structure &rest) const {
    const int32_t end = blocks_.back().end;
    for (size_t part = 0; part < rest.sections.size(); ++part) {
        int32_t last = -1;
        for (uint64_t cell = 0; cell < rest.sections[part].cells; ++cell)
            last = std::max(last, position_of_cell(rest, part, checkpoint_, cell));
        if (last == end - 1) continue;
        throw Error(KVF_ERR_STATE_DAMAGED,
                    format("the checkpoint is of position %d; the blocks end with position %d",
                           last, end - 1));
    }
}

Structure StateJoin::lay_out(unsigned char *memory) const {
    StateWriter out(memory);
    Structure joined = structures_.empty() ? Structure() : lay_out_blocks(out);
    if (!rest_) return joined;
    if (structures_.empty()) {
        // A checkpoint without blocks is a whole state.
        if (memory) copy_metadata(*rest_, checkpoint_, memory, 0, 0);
        joined = *rest_;
        joined.bytes = checkpoint_.bytes;
        return joined;
    }
    const uint64_t frame = frame_bytes(*rest_);
    if (memory) copy_metadata(*rest_, checkpoint_, memory, frame, out.at());
    for (Section section : rest_->sections) {
        section.cells_at += out.at() - frame;
        for (uint64_t &at : section.tensor_at) at += out.at() - frame;
        joined.sections.push_back(std::move(section));
    }
    joined.bytes += checkpoint_.bytes - frame;
    return joined;
}

// Lays out the frame of the state and the sections that the blocks make together.
Structure StateJoin::lay_out_blocks(StateWriter &out) const {
    const Structure &first = structures_.front();
    Structure joined = first;
    joined.sections.clear();
    const int32_t sequence = sequence_of(first, views_.front());
    write_frame(out, first, sequence);
    for (size_t part = 0; part < first.sections.size(); ++part) {
        uint64_t cells = 0;
        for (const Structure &structure : structures_) cells += structure.sections[part].cells;
        size_t block = 0;
        uint64_t before = 0; // how many cells the blocks before `block` have
        const auto copy = [&](StateWriter &o, uint64_t cell) {
            while (cell - before == structures_[block].sections[part].cells)
                before += structures_[block++].sections[part].cells;
            const Section &section = structures_[block].sections[part];
            copy_cell(o,
                      views_[block].data + section.cells_at +
                          (cell - before) * cell_bytes(*first.format),
                      *first.format, sequence);
        };
        joined.sections.push_back(write_attention(out, first.sections[part], cells, copy));
    }
    joined.bytes = out.at();
    return joined;
}

BlockMap StateJoin::map() const {
    BlockMap map;
    for (size_t part = 0; !structures_.empty() && part < structures_[0].sections.size(); ++part) {
        std::vector<const Section *> sections;
        std::vector<CellRun> runs;
        uint64_t first = 0;
        for (size_t i = 0; i < structures_.size(); ++i) {
            const Section &section = structures_[i].sections[part];
            sections.push_back(&section);
            runs.push_back({first, section.cells, i, 0});
            first += section.cells;
        }
        map.add_section(joined_.sections[part], sections, std::move(runs));
    }
    if (rest_) {
        const uint64_t own = structures_.empty() ? 0 : frame_bytes(*rest_);
        const uint64_t body = checkpoint_.bytes - own;
        map.add_rest(joined_.bytes - body, joined_.bytes, blocks_.size(), own);
    }
    return map;
}

// ---- On plain memory ---------------------------------------------------------------------------

void cut_state(const StateView &state, size_t parts, std::span<kvf_block> blocks, void *checkpoint,
               uint64_t *checkpoint_bytes) {
    check_ranges(blocks, false);
    auto found = parse_state_in_every_way(state);
    if (found.empty()) throw Error(KVF_ERR_STATE_DAMAGED);
    const size_t all = found.front().sections.size();
    const auto has_parts = [&](const Structure &structure) {
        if (!structure.format || parts > structure.sections.size()) return false;
        return std::all_of(structure.sections.begin(),
                           structure.sections.begin() + static_cast<ptrdiff_t>(parts),
                           [](const Section &section) {
                               return section.kind == Section::Kind::Attention && section.cells;
                           });
    };
    std::erase_if(found, [&](const Structure &structure) { return !has_parts(structure); });
    if (found.empty()) {
        throw Error(KVF_ERR_UNSUPPORTED,
                    format("the state has no %zu parts of %zu that keep every token", parts, all));
    }
    if (found.size() > 1)
        throw Error(KVF_ERR_UNSUPPORTED, "several known formats describe the state");
    const Structure &whole = found.front();
    const StateCut cut(whole, state, parts, blocks);
    const uint64_t frame = frame_bytes(whole);
    const uint64_t rest = end_of_parts(whole, parts, *whole.format);
    const bool has_rest = whole.sections.size() > parts;
    const uint64_t rest_bytes = has_rest ? frame + state.bytes - rest : 0;
    bool fits = cut.set_sizes(blocks);
    if (checkpoint_bytes) {
        fits &= !checkpoint || *checkpoint_bytes >= rest_bytes;
        *checkpoint_bytes = rest_bytes;
    }
    if (!fits) throw Error(KVF_ERR_BUFFER_TOO_SMALL);
    std::vector<kvf_block> wanted;
    std::copy_if(blocks.begin(), blocks.end(), std::back_inserter(wanted),
                 [](const kvf_block &block) { return block.buffer; });
    if (!wanted.empty()) {
        const StateCut own(whole, state, parts, wanted);
        own.write(wanted, sequence_of(whole, state));
        own.map().for_all([&](size_t block, uint64_t offset, uint64_t place, uint64_t bytes) {
            std::memcpy(static_cast<unsigned char *>(wanted[block].buffer) + offset,
                        state.data + place, bytes);
        });
    }
    if (checkpoint && checkpoint_bytes && has_rest) {
        auto *const out = static_cast<unsigned char *>(checkpoint);
        std::memcpy(out, state.data, frame);
        std::memcpy(out + frame, state.data + rest, state.bytes - rest);
    }
}

void join_state(std::span<const kvf_block> blocks, const void *checkpoint,
                uint64_t checkpoint_bytes, size_t parts, void *state, uint64_t *state_bytes) {
    check_ranges(blocks, true);
    if (blocks.empty()) throw Error(KVF_ERR_INVALID_ARGUMENT, "there are no blocks");
    const StateJoin join(nullptr, parts, blocks, checkpoint, checkpoint_bytes, INT32_MAX - 1);
    const bool fits = !state || *state_bytes >= join.bytes();
    *state_bytes = join.bytes();
    if (!fits) throw Error(KVF_ERR_BUFFER_TOO_SMALL);
    if (!state) return;
    auto *const out = static_cast<unsigned char *>(state);
    join.write(out);
    join.map().for_all([&](size_t block, uint64_t offset, uint64_t place, uint64_t bytes) {
        const void *const from = block == blocks.size() ? checkpoint : blocks[block].buffer;
        std::memcpy(out + place, static_cast<const unsigned char *>(from) + offset, bytes);
    });
}

} // namespace kvf
