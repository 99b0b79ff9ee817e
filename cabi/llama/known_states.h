// What is known of the states of one cache, and whether a state may be loaded into it.
//
// What libllama writes is right by definition; what formats.h reads is believed once libllama
// itself has written it, or has taken one cell of it and written that again.
#pragma once

#include <functional>
#include <mutex>
#include <optional>

#include "llama/context.h"
#include "llama/policy.h"
#include "llama/scratch.h"
#include "llama/sequences.h"

namespace kvf {

// A state that is to be loaded, after it was examined.
struct IncomingState {
    StateView view;                     // without its envelope, if it has one
    std::optional<Structure> structure; // nothing where the cache is opaque
};

// Every function but policy() must be called on the context's thread.
class KnownStates {
public:
    using MakeRecorder = std::function<Recorder(Direction, const void *buffer, uint64_t bytes)>;

    // `by_tap`: the tap is used, so that recorders note tensor bytes. `context` and `sequences`
    // must outlive this object.
    KnownStates(const LlamaContext &context, LlamaSequences &sequences, bool by_tap,
                MakeRecorder make_recorder);

    CachePolicy policy() const; // any thread
    bool is_unseen() const { return policy_.format() == CachePolicy::Format::Unseen; }
    const Structure *structure() const { return structure_ ? &*structure_ : nullptr; }

    // Looks at the state of a sequence. An empty one tells the kind of the cache, one with cells
    // its types and row sizes too; and whether a known format describes it. One that is empty in a
    // part of the cache tells this of the other parts. Throws KVF_ERR_UNSUPPORTED for a context
    // without cells of its own.
    void look_at(int32_t sequence);
    // Looks at a sequence that has cells, if there is one, else at those that have some in a part
    // of the cache.
    void look_at_any();
    // Looks at the sequence that tells most, or that is cheapest to look at.
    void look_first();
    // Notes the structure of a state that libllama has written or taken.
    void note_believed(const Structure &structure);

    // Returns the state, if it may be loaded into the sequence. `flags`: KVF_SUBMIT_*. Throws
    // KVF_ERR_STATE_DAMAGED, KVF_ERR_STATE_MISMATCH or KVF_ERR_CACHE_FULL, and then nothing has
    // been changed.
    IncomingState examine(int32_t sequence, const unsigned char *state, uint64_t bytes,
                          uint32_t flags);

    // The state of a sequence without its tensor bytes, and what was recorded of these.
    struct Metadata {
        ScratchState state;
        uint64_t bytes;
        Recorded recorded;

        StateView view() const { return {state.data, bytes}; }
    };
    // Returns what libllama writes for a sequence; nothing where libllama refuses. No tensor byte
    // is moved (without the tap, libllama copies them).
    std::optional<Metadata> record_metadata(int32_t sequence);

    // Whether any part of the cache has cells of the sequence. libllama says that a sequence is
    // empty where one part is: a sliding window that has lost its cells, or recurrent layers.
    bool holds_cells(int32_t sequence);
    // Whether all parts have cells, but for a sliding window: less no load takes.
    bool holds_state(int32_t sequence);
    void empty_sequence(int32_t sequence);
    // Before a load: what an empty sequence looks like, for what_is_left().
    void note_empty(int32_t sequence);
    // Returns in words what a failed load has left behind that removing the sequence did not
    // remove;
    // "" if nothing.
    std::string what_is_left(int32_t sequence) const;
    std::string describe_cells(const Structure &state) const;

private:
    int32_t most_telling_sequence() const;
    void look_at_parts();
    bool may_be_empty_in_part() const;
    void note_parts_with_cells(std::vector<Structure> &&found, const Recorded &recorded);
    std::vector<Structure> read_though_empty(int32_t sequence);
    void learn_that_opaque();
    Structure examine_known(const StateView &view) const;
    Structure examine_first(int32_t sequence, const StateView &view);
    IncomingState examine_sealed(const unsigned char *state, uint64_t bytes, uint32_t flags) const;
    bool disagrees(const Structure &structure, const StateView &view) const;
    bool is_known_where_it_has_cells(const Structure &candidate) const;
    bool is_believed(int32_t sequence, const Structure &candidate);
    int32_t sequence_for_trial(int32_t sequence);
    bool takes_format_of(int32_t sequence, const Structure &candidate);
    bool writes_as(int32_t sequence, const Structure &candidate);

    const LlamaContext &context_;
    LlamaSequences &sequences_;
    const bool by_tap_;
    const MakeRecorder make_recorder_;

    std::optional<Structure> structure_; // unless opaque; without cells while unseen
    bool positions_agree_ = true;        // in the states that this libllama has written
    uint64_t empty_bytes_ = 0;           // of the state of an empty sequence; 0: not seen

    // Held by the context's thread while it changes the policy, and by other threads that read it.
    mutable std::mutex mutex_;
    CachePolicy policy_;
};

} // namespace kvf
