// Saves and loads of blocks and checkpoints. They go the way of states (save.cpp, load.cpp), with
// one difference: libllama writes or takes a state of which only the metadata exists, and the
// tensor bytes, which the recorder notes, lie in blocks.
#include "states/blocks.h"

#include "llama/llama.h"
#include "llama/spreader.h"
#include "memory/buffer_checks.h"

namespace kvf {

// The memory of blocks and of a checkpoint, as one buffer from the lowest address to the highest.
struct BufferOfParts {
    std::vector<std::pair<const void *, uint64_t>> parts;
    unsigned char *begin = nullptr;
    uint64_t extent = 0; // from `begin` to the end of the last part
    uint64_t bytes = 0;  // of all parts together

    BufferOfParts(Direction direction, std::span<const kvf_block> blocks, const void *checkpoint,
                  uint64_t checkpoint_bytes) {
        for (const kvf_block &block : blocks) add(direction, block.buffer, block.bytes);
        if (checkpoint) add(direction, checkpoint, checkpoint_bytes);
        auto sorted = parts;
        std::sort(sorted.begin(), sorted.end());
        for (size_t i = 1; i < sorted.size(); ++i) {
            if (end_of(sorted[i - 1]) > sorted[i].first)
                throw Error(KVF_ERR_INVALID_ARGUMENT, "the buffers of blocks overlap");
        }
        if (sorted.empty()) return;
        begin = static_cast<unsigned char *>(const_cast<void *>(sorted.front().first));
        extent = static_cast<uint64_t>(end_of(sorted.back()) - begin);
    }
    // Where each part begins in the buffer.
    std::vector<uint64_t> places() const {
        std::vector<uint64_t> places;
        places.reserve(parts.size());
        for (const auto &[part, count] : parts)
            places.push_back(
                static_cast<uint64_t>(static_cast<const unsigned char *>(part) - begin));
        return places;
    }
    // Where each part begins in the device memory in which the parts are staged.
    std::vector<uint64_t> places_in(const LoadAhead &load_ahead) const {
        std::vector<uint64_t> staged = places();
        for (uint64_t &place : staged) place = load_ahead.bytes_before(place);
        return staged;
    }
    // Where each part lies in the buffer.
    std::vector<BufferPart> in_buffer() const {
        std::vector<BufferPart> placed;
        placed.reserve(parts.size());
        const std::vector<uint64_t> at = places();
        for (size_t i = 0; i < parts.size(); ++i) placed.push_back({at[i], parts[i].second});
        return placed;
    }
    void set_in(Submission &submission) const {
        submission.buffer = begin;
        submission.buffer_bytes = extent;
        submission.parts = parts;
    }

private:
    static const unsigned char *end_of(const std::pair<const void *, uint64_t> &part) {
        return static_cast<const unsigned char *>(part.first) + part.second;
    }
    void add(Direction direction, const void *buffer, uint64_t count) {
        if (!buffer || count == 0)
            throw Error(KVF_ERR_INVALID_ARGUMENT, "a buffer is NULL or empty");
        check_accessible(direction, buffer, count);
        parts.emplace_back(buffer, count);
        bytes += count;
    }
};

namespace {

// Spreads the layouts of a load ahead. The layout of `device` goes to the places where the parts
// are staged, and the layouts of other devices go to the places of the parts in the buffer.
Layouts spread_staged(Layouts &&layouts, Spreader &in_buffer, uint32_t device,
                      Spreader &&in_staging) {
    Layouts in_place;
    Layouts staged;
    for (auto &[on, layout] : layouts)
        (on == device ? staged : in_place).emplace_back(on, std::move(layout));
    Layouts result = in_buffer.spread(in_place);
    for (auto &layout : in_staging.spread(staged)) result.push_back(std::move(layout));
    return result;
}

void check_all_recorded(const Structure &structure, const Layouts &layouts,
                        const Layouts &early = {}) {
    uint64_t bytes = 0;
    for (const auto &[device, layout] : layouts) bytes += layout.bytes;
    for (const auto &[device, layout] : early) bytes += layout.bytes;
    if (bytes == structure.tensor_bytes) return;
    throw Error(KVF_ERR_UNSUPPORTED,
                "a part of the cache is in memory that no device of the engine reaches");
}

// libllama rounds the cells of a cache up to a multiple of this.
constexpr uint64_t kCellPadding = 256;

// Returns the size of a state without cells whose sections all are of attention and have one
// stream: each section is the number of its streams and the number of its cells.
uint64_t empty_state_bytes(const Structure &structure) {
    const uint64_t sections = structure.sections.size() * 2 * sizeof(uint32_t);
    return structure.framed ? kFrameBytes + sections : sections;
}

} // namespace

// A sequence id of the context that is empty before and afterwards. In between, the sequence shares
// some cells of another one.
class Llama::BorrowedSequence {
public:
    BorrowedSequence(Llama &llama, int32_t from, int32_t begin, int32_t end)
        : llama_(llama), id(llama.find_empty_sequence()) {
        if (id >= 0) llama_.context_.share(from, id, begin, end);
    }
    ~BorrowedSequence() {
        if (id >= 0) llama_.context_.remove(id);
    }
    BorrowedSequence(const BorrowedSequence &) = delete;
    BorrowedSequence &operator=(const BorrowedSequence &) = delete;

private:
    Llama &llama_;

public:
    const int32_t id; // negative: the context has no empty sequence
};

// Returns a sequence without cells and without a transfer in flight; negative if there is none.
int32_t Llama::find_empty_sequence() const {
    // Only sequences of one stream can share cells. A copy of a part of a recurrent sequence has
    // the recurrent cell of the whole sequence, and libllama would then move that cell.
    const Structure *const structure = states_->structure();
    if (!structure || context_.has_recurrent_layers()) return -1;
    if (structure->sections[0].streams != 1) return -1;
    for (uint32_t i = context_.sequence_count(); i-- > 0;) {
        const auto sequence = static_cast<int32_t>(i);
        if (context_.holds_cells(sequence) || !sequences_->is_idle(sequence)) continue;
        if (positions_tell_cells() || !states_->holds_cells(sequence)) return sequence;
    }
    return -1;
}

// Whether a sequence without a last position has no cells. In other caches one part may be empty,
// and libllama then says that the whole sequence is empty.
bool Llama::positions_tell_cells() const {
    return states_->structure()->sections.size() == 1 && context_.window() == 0;
}

// Returns scratch memory for the state of a sequence: either a borrowed sequence, or the one that
// the blocks are saved of. Throws KVF_ERR_SEQUENCE_EMPTY if a borrowed sequence has no cells.
BorrowedScratch Llama::make_scratch(int32_t sequence, bool is_borrowed) {
    const Structure &structure = *states_->structure();
    const char *const none = "no token at the positions of the blocks";
    if (is_borrowed && positions_tell_cells()) {
        if (!context_.holds_cells(sequence)) throw Error(KVF_ERR_SEQUENCE_EMPTY, none);
        try {
            // The size of the largest possible state is enough, since the memory is mostly address
            // space. To ask libllama for the size of this state would take another walk over all
            // cells.
            return BorrowedScratch(scratch_,
                                   block_bytes(structure, context_.most_cells() + kCellPadding));
        } catch (const Error &) {
            // Address space is limited. The size of this state is enough.
        }
    }
    const uint64_t bytes = context_.state_bytes(sequence);
    if (is_borrowed && bytes == empty_state_bytes(structure))
        throw Error(KVF_ERR_SEQUENCE_EMPTY, none);
    return BorrowedScratch(scratch_, bytes);
}

void Llama::look_for_blocks(int32_t sequence) {
    settle();
    check_usable();
    if (!tap_) return;
    if (states_->is_unseen() && context_.holds_cells(sequence)) states_->look_at(sequence);
    if (states_->is_unseen()) states_->look_at_any();
}

void Llama::check_blocks_allowed(bool checkpoints) const {
    if (!tap_)
        throw Error(KVF_ERR_UNSUPPORTED,
                    "blocks need the tap: libllama's calls cannot be recorded");
    const CachePolicy policy = states_->policy();
    const kvf_blocks_allowed allowed = policy.blocks_allowed();
    const bool has_blocks = allowed == KVF_BLOCKS_ALONE || allowed == KVF_BLOCKS_WITH_CHECKPOINTS;
    const bool has_checkpoints =
        allowed == KVF_BLOCKS_CHECKPOINTS_ALONE || allowed == KVF_BLOCKS_WITH_CHECKPOINTS;
    if (checkpoints ? has_checkpoints : has_blocks) return;
    if (allowed == KVF_BLOCKS_ALONE)
        throw Error(KVF_ERR_UNSUPPORTED, "every layer keeps every token: blocks are enough");
    throw Error(allowed == KVF_BLOCKS_UNSEEN ? KVF_ERR_SEQUENCE_EMPTY : KVF_ERR_UNSUPPORTED,
                policy.why_not_more_blocks());
}

kvf_blocks_allowed Llama::blocks_allowed(std::string &why) {
    look_for_blocks(0);
    why = tap_ ? states_->policy().why_not_more_blocks() : "libllama's calls cannot be recorded";
    return tap_ ? states_->policy().blocks_allowed() : KVF_BLOCKS_NONE;
}

uint64_t Llama::block_size(uint32_t tokens) {
    look_for_blocks(0);
    check_blocks_allowed(false);
    if (tokens == 0) throw Error(KVF_ERR_INVALID_ARGUMENT, "tokens is 0");
    return block_bytes(parts_in_blocks(*states_->structure(), states_->policy().parts_in_blocks()),
                       tokens);
}

void Llama::save_blocks(int32_t sequence, std::span<kvf_block> blocks,
                        const std::function<void()> &sizes_known, const kvf_submit_options &options,
                        kvf_job *job) {
    check_ranges(blocks, false);
    const BufferOfParts given(Direction::Save, blocks, nullptr, 0);
    Submission submission = make_submission(Direction::Save, sequence, options);
    check_sequence(sequence, Holds::Cells);
    sequences_->check_idle(sequence, LlamaSequences::Busy::WithLoads);
    look_for_blocks(sequence);
    check_blocks_allowed(false);
    if (blocks.empty()) throw Error(KVF_ERR_INVALID_ARGUMENT, "there are no blocks");

    const BorrowedSequence borrowed(*this, sequence, blocks.front().begin, blocks.back().end);
    const int32_t listed = borrowed.id < 0 ? sequence : borrowed.id;
    const BorrowedScratch scratch = make_scratch(listed, borrowed.id >= 0);
    Recorder recorder =
        make_recorder(Direction::Save, scratch.data, scratch.bytes(), submission.gate);
    Recorded recorded = record_save(listed, scratch.data, scratch.bytes(), recorder);
    const StateView view{scratch.data, recorded.bytes};
    const auto whole = parse_state(view, states_->structure());
    if (!whole || !whole->format)
        throw Error(KVF_ERR_LLAMA, "it wrote a state of another format than before");
    check_all_recorded(*whole, recorded.layouts);
    const StateCut cut(*whole, view, states_->policy().parts_in_blocks(), blocks);
    const bool fits = cut.set_sizes(blocks);
    sizes_known();
    if (!fits) throw Error(KVF_ERR_BUFFER_TOO_SMALL, "of a block");
    const BufferOfParts buffer(Direction::Save, blocks, nullptr, 0);
    cut.write(blocks, sequence);

    recorded.layouts = Spreader(cut.map(), buffer.places()).spread(recorded.layouts);
    recorded.bytes = buffer.bytes;
    buffer.set_in(submission);
    submission.mode = options.mode;
    if (options.mode == KVF_SAVE_AUTO) {
        // Decoding never overwrites the cells of blocks as long as the sequence holds them.
        submission.mode =
            states_->policy().keeps_first_position() ? KVF_SAVE_IN_PLACE : KVF_SAVE_SNAPSHOT;
    }
    const auto fence = submission.fence;
    if (submission.mode == KVF_SAVE_SNAPSHOT) {
        submit_snapshot(std::move(submission), std::move(recorded), options, job);
        return;
    }
    Enclosure enclosed = enclosure(Direction::Save, sequence, recorder, false);
    enclosed.is_disturbed = watch_blocks(sequence, blocks.back().end);
    fence->raise(std::move(enclosed));
    submit_job(*engine_, std::move(submission), std::move(recorded), options, job);
}

// As watch() for a save. Blocks stay unchanged as long as the sequence holds their positions.
std::function<bool()> Llama::watch_blocks(int32_t sequence, int32_t end) const {
    const bool keeps_first = states_->policy().keeps_first_position();
    return [=, this, first = context_.first_position(sequence)] {
        if (context_.last_position(sequence) < end - 1) return true;
        return keeps_first && context_.first_position(sequence) != first;
    };
}

// A load can use a checkpoint only at a known position.
void Llama::check_has_position(int32_t sequence) const {
    if (context_.holds_cells(sequence)) return;
    throw Error(KVF_ERR_SEQUENCE_EMPTY,
                format("the sliding window or recurrent layers of sequence %d", sequence));
}

uint64_t Llama::checkpoint_size(int32_t sequence) {
    look_for_blocks(sequence);
    check_sequence(sequence, Holds::Cells);
    check_blocks_allowed(true);
    check_has_position(sequence);
    const uint64_t bytes = context_.state_bytes(sequence, LlamaContext::Extent::Partial);
    if (bytes == 0) throw Error(KVF_ERR_LLAMA, "llama_state_seq_get_size_ext failed");
    return bytes;
}

void Llama::save_checkpoint(int32_t sequence, void *buffer, uint64_t bytes,
                            const kvf_submit_options &options, kvf_job *job) {
    Submission submission = make_submission(Direction::Save, sequence, options);
    set_buffer(submission, buffer, bytes);
    check_sequence(sequence, Holds::Cells);
    sequences_->check_idle(sequence, LlamaSequences::Busy::WithLoads);
    look_for_blocks(sequence);
    check_blocks_allowed(true);
    check_has_position(sequence);
    Recorder recorder =
        make_recorder(Direction::Save, submission.buffer, submission.buffer_bytes, submission.gate);
    Recorded recorded = record_save(sequence, submission.buffer, submission.buffer_bytes, recorder,
                                    LlamaContext::Extent::Partial);
    const Structure like =
        parts_in_checkpoint(*states_->structure(), states_->policy().parts_in_blocks());
    if (!parse_state({submission.buffer, recorded.bytes}, &like)) {
        throw Error(KVF_ERR_UNSUPPORTED,
                    "this libllama does not write windows and recurrent layers alone");
    }
    submission.buffer_bytes = recorded.bytes;
    submit_snapshot(std::move(submission), std::move(recorded), options, job);
}

void Llama::load_blocks(int32_t sequence, std::span<const kvf_block> blocks, const void *checkpoint,
                        uint64_t checkpoint_bytes, const kvf_submit_options &options,
                        kvf_job *job) {
    check_ranges(blocks, true);
    const BufferOfParts buffer(Direction::Load, blocks, checkpoint, checkpoint_bytes);
    if (buffer.parts.empty()) throw Error(KVF_ERR_INVALID_ARGUMENT, "there are no blocks");
    Submission submission = make_submission(Direction::Load, sequence, options);
    check_sequence(sequence, Holds::Nothing);
    sequences_->check_idle(sequence, LlamaSequences::Busy::WithAny);
    for (const auto &[part, bytes] : buffer.parts) {
        if (submission.gate && may_be_written_by_stream(part, bytes)) submission.gate->wait();
    }
    look_for_blocks(sequence);
    check_loadable(blocks.size(), checkpoint != nullptr);
    const StateJoin join = join_blocks(blocks, checkpoint, checkpoint_bytes);
    const BorrowedScratch scratch(scratch_, join.bytes());
    join.write(scratch.data);
    const IncomingState state = states_->examine(sequence, scratch.data, join.bytes(), 0);
    if (!state.structure) throw Error(KVF_ERR_UNSUPPORTED, states_->policy().why_not_more_blocks());

    buffer.set_in(submission);
    // From here on a failure leaves the sequence empty.
    try {
        if (!state.structure->has_cells_everywhere()) {
            states_->empty_sequence(sequence);
            states_->note_empty(sequence);
        }
        load_joined(sequence, state.view, *state.structure, join.map(), buffer,
                    std::move(submission), options, job);
    } catch (...) {
        states_->empty_sequence(sequence);
        throw;
    }
}

StateJoin Llama::join_blocks(std::span<const kvf_block> blocks, const void *checkpoint,
                             uint64_t checkpoint_bytes) const {
    const CachePolicy policy = states_->policy();
    const bool is_known = policy.blocks_allowed() != KVF_BLOCKS_UNSEEN;
    const Structure *const like = is_known ? states_->structure() : nullptr;
    const size_t parts = is_known ? policy.parts_in_blocks() : 0;
    return StateJoin(like, parts, blocks, checkpoint, checkpoint_bytes,
                     context_.last_sane_position());
}

// As load_recorded(): `view` has only the metadata of the state that the blocks make together, and
// `map` tells where its tensor bytes lie in them.
void Llama::load_joined(int32_t sequence, const StateView &view, const Structure &structure,
                        const BlockMap &map, const BufferOfParts &buffer, Submission &&submission,
                        const kvf_submit_options &options, kvf_job *job) {
    const auto fence = submission.fence;
    const auto gate = submission.gate;
    Recorder recorder = make_recorder(Direction::Load, view.data, view.bytes, gate);
    const bool stops_rows = guard_window(structure, view, recorder, gate.get());
    std::optional<OpenJob> open;
    uint32_t device = Device::kHost;
    const auto load_ahead = make_load_ahead(options.mode, buffer.in_buffer(), device);
    submission.mode = load_ahead ? KVF_LOAD_AHEAD : KVF_LOAD_IN_PLACE;
    if (load_ahead) {
        open.emplace(*engine_, std::move(submission), options, job != nullptr);
        open->stage(device, load_ahead);
    }
    Recorded recorded = take_cells(sequence, view, structure, recorder, open);
    const Layouts early = recorder.take_early();
    check_all_recorded(structure, recorded.layouts, early);
    Spreader in_buffer(map, buffer.places());
    recorded.layouts = load_ahead ? spread_staged(std::move(recorded.layouts), in_buffer, device,
                                                  Spreader(map, buffer.places_in(*load_ahead)))
                                  : in_buffer.spread(recorded.layouts);
    recorded.bytes = buffer.bytes;
    fence->raise(enclosure(Direction::Load, sequence, recorder, stops_rows));
    move_now(Direction::Load, buffer.begin, buffer.extent, in_buffer.spread(early), nullptr);
    // The recording has shown whether this device holds a part of the cache.
    if (load_ahead && !devices_.contains(device)) recorded.mode = KVF_LOAD_IN_PLACE;
    commit(open, submission, std::move(recorded), options, job);
}

void Llama::check_loadable(size_t blocks, bool has_checkpoint) const {
    // In a context that has had no cells, the blocks themselves tell what its cache must be.
    if (states_->is_unseen() && tap_) return;
    const kvf_blocks_allowed allowed = states_->policy().blocks_allowed();
    check_blocks_allowed(allowed == KVF_BLOCKS_CHECKPOINTS_ALONE);
    const bool needs_blocks = allowed != KVF_BLOCKS_CHECKPOINTS_ALONE;
    const bool needs_checkpoint = allowed != KVF_BLOCKS_ALONE;
    if (needs_blocks != (blocks > 0)) {
        throw Error(KVF_ERR_INVALID_ARGUMENT,
                    needs_blocks ? "there are no blocks" : "this cache has no blocks");
    }
    if (needs_checkpoint == has_checkpoint) return;
    throw Error(KVF_ERR_INVALID_ARGUMENT, needs_checkpoint ? "this cache needs a checkpoint"
                                                           : "this cache has no checkpoints");
}

} // namespace kvf
