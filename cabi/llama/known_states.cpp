#include "llama/known_states.h"

#include <algorithm>

#include "states/cells.h"
#include "states/envelope.h"
#include "states/writer.h"

namespace kvf {
namespace {

const char kOfAPart[] = "it has cells for a part of the memory only";
const char kDisagrees[] = "its parts have cells at different positions";

// Whether a known format accounts for the state, and every part of it has cells, or none.
bool looks_known(const StateView &view) {
    const auto found = parse_state_in_every_way(view);
    return std::any_of(found.begin(), found.end(), [](const Structure &structure) {
        return structure.cells() == 0 || structure.has_cells_everywhere();
    });
}

// Whether a state has cells, if it is read in one of these ways.
bool has_cells(const std::vector<Structure> &found) {
    return std::any_of(found.begin(), found.end(),
                       [](const Structure &structure) { return structure.cells() > 0; });
}

} // namespace

KnownStates::KnownStates(const LlamaContext &context, LlamaSequences &sequences, bool by_tap,
                         MakeRecorder make_recorder)
    : context_(context), sequences_(sequences), by_tap_(by_tap),
      make_recorder_(std::move(make_recorder)),
      policy_(context.window(), context.has_recurrent_layers()) {}

CachePolicy KnownStates::policy() const {
    std::lock_guard lock(mutex_);
    return policy_;
}

// With the tap this is a sequence that has cells: its state tells most, and costs little. Without
// the tap it is an empty sequence if there is one, because libllama then copies the whole state.
int32_t KnownStates::most_telling_sequence() const {
    for (uint32_t i = 0; i < context_.sequence_count(); ++i) {
        const auto sequence = static_cast<int32_t>(i);
        const bool empty = !context_.holds_cells(sequence);
        if (empty == !by_tap_) return sequence;
    }
    return 0;
}

std::optional<KnownStates::Metadata> KnownStates::record_metadata(int32_t sequence) {
    const uint64_t bytes = context_.state_bytes(sequence);
    if (bytes == 0) return std::nullopt;
    ScratchState scratch(bytes);
    Recorder recorder = make_recorder_(Direction::Save, scratch.data, bytes);
    uint64_t written = 0;
    try {
        Recording recording(recorder);
        written =
            context_.api().state_seq_get_data(context_.pointer(), scratch.data, bytes, sequence, 0);
    } catch (...) {
        return std::nullopt;
    }
    if (written == 0) return std::nullopt;
    Recorded recorded = recorder.finish(); // throws what went wrong
    sequences_.note_tensors(recorder.tensors());
    return Metadata{std::move(scratch), written, std::move(recorded)};
}

bool KnownStates::may_be_empty_in_part() const {
    return context_.window() > 0 || context_.has_recurrent_layers();
}

// What libllama writes for a sequence that it calls empty, where a part of it need not be.
std::vector<Structure> KnownStates::read_though_empty(int32_t sequence) {
    if (!may_be_empty_in_part() || policy_.is_opaque()) return {};
    const auto metadata = record_metadata(sequence);
    if (!metadata) return {};
    return parse_state_in_every_way(metadata->view(), structure());
}

bool KnownStates::holds_cells(int32_t sequence) {
    return context_.holds_cells(sequence) || has_cells(read_though_empty(sequence));
}

bool KnownStates::holds_state(int32_t sequence) {
    if (context_.holds_cells(sequence)) return true;
    const auto found = read_though_empty(sequence);
    return has_cells(found) &&
           std::none_of(found.begin(), found.end(), [this](const Structure &structure) {
               return policy_.lacks_cells(structure);
           });
}

void KnownStates::look_at(int32_t sequence) {
    const auto metadata = record_metadata(sequence);
    if (!metadata) return;
    if (is_frame_alone(metadata->view())) {
        throw Error(KVF_ERR_UNSUPPORTED,
                    "the context uses the cells of another context, which saves and loads "
                    "them: attach to that one");
    }
    const bool empty = !context_.holds_cells(sequence);
    auto found = parse_state_in_every_way(metadata->view(), structure_ ? &*structure_ : nullptr);
    if (empty && has_cells(found))
        return note_parts_with_cells(std::move(found), metadata->recorded);
    if (empty) empty_bytes_ = metadata->bytes;
    // The tap knows how many bytes are those of tensors; without it, they cannot be distinguished.
    std::erase_if(found, [&](const Structure &structure) {
        if (empty != (structure.cells() == 0)) return true;
        // A format that is not known can look like a known one of more parts, of which some are
        // empty.
        if (!empty && policy_.lacks_cells(structure)) return true;
        return by_tap_ && structure.tensor_bytes != metadata->recorded.bytes;
    });
    if (found.empty()) {
        if (!empty && by_tap_ && metadata->recorded.bytes == 0)
            throw Error(KVF_ERR_TAP, "libllama moved tensor bytes in a way that was not recorded");
        return learn_that_opaque();
    }
    if (!empty && !positions_agree(found.front(), metadata->view())) positions_agree_ = false;
    note_believed(found.front());
}

// Of a sequence that libllama calls empty although some parts have cells. Of the part that is empty
// it tells nothing.
void KnownStates::note_parts_with_cells(std::vector<Structure> &&found, const Recorded &recorded) {
    std::erase_if(found, [&](const Structure &structure) {
        return structure.cells() == 0 || structure.tensor_bytes != recorded.bytes;
    });
    if (by_tap_ && found.size() == 1) note_believed(found.front());
}

void KnownStates::look_first() {
    look_at(most_telling_sequence());
    if (is_unseen()) look_at_parts();
}

void KnownStates::look_at_any() {
    for (uint32_t i = 0; i < context_.sequence_count() && is_unseen(); ++i) {
        const auto sequence = static_cast<int32_t>(i);
        if (context_.holds_cells(sequence)) look_at(sequence);
    }
    if (is_unseen()) look_at_parts();
}

// Looks at the sequences that libllama calls empty, where a part of them need not be.
void KnownStates::look_at_parts() {
    if (!by_tap_ || !may_be_empty_in_part()) return;
    for (uint32_t i = 0; i < context_.sequence_count() && is_unseen(); ++i)
        look_at(static_cast<int32_t>(i));
}

void KnownStates::note_believed(const Structure &structure) {
    if (!structure_) {
        structure_ = structure;
        std::lock_guard lock(mutex_);
        policy_.note_parts(structure);
    } else if (structure_->sections.size() == structure.sections.size()) {
        for (size_t i = 0; i < structure.sections.size(); ++i) {
            if (structure_->sections[i].cells == 0) structure_->sections[i] = structure.sections[i];
        }
        if (!structure_->format) structure_->format = structure.format;
    }
    if (!structure_->format) return;
    std::lock_guard lock(mutex_);
    policy_.note_cells(*structure_);
    if (structure_->has_cells_everywhere()) policy_.note_known(*structure_);
}

void KnownStates::learn_that_opaque() {
    structure_.reset();
    std::lock_guard lock(mutex_);
    policy_.note_opaque();
}

IncomingState KnownStates::examine(int32_t sequence, const unsigned char *state, uint64_t bytes,
                                   uint32_t flags) {
    if (policy_.is_opaque()) return examine_sealed(state, bytes, flags);
    const StateView view{state, bytes, context_.last_sane_position()};
    // To the version of kvferry that saved the state, this cache may have been opaque. Or this
    // context may not have seen a cell yet.
    if (Envelope::is_on(state, bytes)) {
        IncomingState sealed = examine_sealed(state, bytes, flags);
        if (policy_.format() == CachePolicy::Format::Known)
            sealed.structure = examine_known(sealed.view);
        return sealed;
    }
    if (policy_.format() == CachePolicy::Format::Known) return {view, examine_known(view)};
    if (flags & KVF_SUBMIT_TRUST_STATE && !looks_known(view)) return {view, std::nullopt};
    return {view, examine_first(sequence, view)};
}

Structure KnownStates::examine_known(const StateView &view) const {
    const Structure &cache = *structure();
    auto state = parse_state(view, &cache);
    if (!state) state = parse_state(view);
    if (!state) throw Error(KVF_ERR_STATE_DAMAGED);
    const std::string why = mismatch(*state, cache);
    if (!why.empty()) throw Error(KVF_ERR_STATE_MISMATCH, why);
    if (state->cells() == 0) return std::move(*state);
    if (state->cells() > context_.most_cells())
        throw Error(KVF_ERR_CACHE_FULL, describe_cells(*state));
    // libllama takes such a state. The sequence is then empty in one part of the memory and has
    // cells in another.
    if (policy_.lacks_cells(*state)) throw Error(KVF_ERR_STATE_DAMAGED, kOfAPart);
    if (disagrees(*state, view)) throw Error(KVF_ERR_STATE_DAMAGED, kDisagrees);
    return std::move(*state);
}

// libllama takes a state whose parts disagree. Some layers then have tokens that other layers do
// not have.
bool KnownStates::disagrees(const Structure &structure, const StateView &view) const {
    return positions_agree_ && !positions_agree(structure, view);
}

// For a context of which no sequence has cells in every part. Most have none at all: the first
// state with cells then comes from outside.
Structure KnownStates::examine_first(int32_t sequence, const StateView &view) {
    const Structure *const skeleton = structure_ ? &*structure_ : nullptr;
    auto candidates = parse_state_in_every_way(view, skeleton);
    if (candidates.empty()) {
        const auto other = parse_state(view);
        if (!other) throw Error(KVF_ERR_STATE_DAMAGED);
        const std::string why = skeleton ? mismatch(*other, *skeleton) : "";
        throw Error(KVF_ERR_STATE_MISMATCH, why);
    }
    std::string why;
    bool any_disagrees = false;
    for (Structure &candidate : candidates) {
        if (candidate.cells() == 0) return std::move(candidate);
        if (skeleton) {
            why = mismatch(candidate, *skeleton);
            if (!why.empty()) continue;
        }
        if (is_known_where_it_has_cells(candidate) ? policy_.lacks_cells(candidate)
                                                   : !candidate.has_cells_everywhere()) {
            throw Error(KVF_ERR_STATE_DAMAGED, kOfAPart);
        }
        if (disagrees(candidate, view)) {
            any_disagrees = true; // read in another way it may agree
            continue;
        }
        if (!is_believed(sequence, candidate)) continue;
        note_believed(candidate);
        return std::move(candidate);
    }
    if (any_disagrees) throw Error(KVF_ERR_STATE_DAMAGED, kDisagrees);
    if (!why.empty()) throw Error(KVF_ERR_STATE_MISMATCH, why);
    throw Error(KVF_ERR_STATE_MISMATCH,
                format("this context does not take states of its structure (format \"%s\")",
                       candidates.front().format->name));
}

// Whether sequences of the context have cells in all parts in which the candidate has some.
bool KnownStates::is_known_where_it_has_cells(const Structure &candidate) const {
    if (!structure_ || !structure_->format) return false;
    for (size_t i = 0; i < candidate.sections.size(); ++i) {
        if (candidate.sections[i].cells && !structure_->sections[i].cells) return false;
    }
    return true;
}

// A format is believed when libllama has written it, or has taken one cell in it and written that
// again.
bool KnownStates::is_believed(int32_t sequence, const Structure &candidate) {
    if (is_known_where_it_has_cells(candidate)) return true;
    const int32_t trial = sequence_for_trial(sequence);
    // Without a sequence for it there is no trial, which would cost this one its cells. The format
    // is known from these, and libllama itself refuses tensors of other shapes.
    if (trial < 0) return structure_ && structure_->format == candidate.format;
    return takes_format_of(trial, candidate);
}

// A sequence without cells: the given one, or another one. Negative: there is none.
int32_t KnownStates::sequence_for_trial(int32_t sequence) {
    if (!holds_cells(sequence)) return sequence;
    for (uint32_t i = 0; i < context_.sequence_count(); ++i) {
        const auto other = static_cast<int32_t>(i);
        if (sequences_.is_idle(other) && !holds_cells(other)) return other;
    }
    return -1;
}

// Tries the candidate's format: libllama is given a state of one cell. Only called for an empty
// sequence, which is empty again afterwards.
bool KnownStates::takes_format_of(int32_t sequence, const Structure &candidate) {
    const auto one_cell = make_state_of_one_cell(candidate);
    const StateView view{one_cell.data(), one_cell.size(), context_.last_sane_position()};
    Recorder recorder = make_recorder_(Direction::Load, view.data, view.bytes);
    try {
        const bool takes =
            context_.read_state(sequence, view, recorder) && writes_as(sequence, candidate);
        empty_sequence(sequence);
        return takes;
    } catch (...) {
        empty_sequence(sequence); // the cell must not stay
        throw;
    }
}

// Whether libllama writes a state of one cell as the candidate has it.
bool KnownStates::writes_as(int32_t sequence, const Structure &candidate) {
    const auto written = record_metadata(sequence);
    if (!written || written->bytes != make_state_of_one_cell(candidate).size()) return false;
    const auto structure = parse_state(written->view(), &candidate);
    return structure && structure->format == candidate.format &&
           mismatch(*structure, candidate).empty();
}

IncomingState KnownStates::examine_sealed(const unsigned char *state, uint64_t bytes,
                                          uint32_t flags) const {
    if (!Envelope::is_on(state, bytes)) {
        if (flags & KVF_SUBMIT_TRUST_STATE)
            return {{state, bytes, context_.last_sane_position()}, std::nullopt};
        throw Error(KVF_ERR_STATE_DAMAGED,
                    "the format of this cache's states is not known, and nothing else vouches for "
                    "one without kvferry's envelope");
    }
    const auto verdict = Envelope::verify(state, bytes, context_.fingerprint_number());
    if (verdict.foreign) throw Error(KVF_ERR_STATE_MISMATCH, verdict.why);
    if (verdict.damaged) throw Error(KVF_ERR_STATE_DAMAGED, verdict.why);
    return {{state, bytes - Envelope::kBytes, context_.last_sane_position()}, std::nullopt};
}

std::string KnownStates::what_is_left(int32_t sequence) const {
    const bool clean = !context_.holds_cells(sequence) &&
                       (empty_bytes_ == 0 || context_.state_bytes(sequence) == empty_bytes_);
    return clean ? "" : "; it left cells behind that only llama_memory_clear() frees";
}

std::string KnownStates::describe_cells(const Structure &state) const {
    return format("the state has %llu cells; a sequence may have %u",
                  static_cast<unsigned long long>(state.cells()), context_.most_cells());
}

void KnownStates::empty_sequence(int32_t sequence) {
    sequences_.forget(sequence);
    context_.remove(sequence);
}

void KnownStates::note_empty(int32_t sequence) {
    if (empty_bytes_ == 0) empty_bytes_ = context_.state_bytes(sequence);
}

} // namespace kvf
