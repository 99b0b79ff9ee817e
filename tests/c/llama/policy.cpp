// How sequences are saved and loaded, by what is known of their cache.
#include "llama/policy.h"

#include "check.hpp"
#include "kvferry.h"
#include "state_builder.hpp"

using namespace kvf;

namespace {

Structure parse(const StateBuilder &state) {
    const auto structure = parse_state({state.bytes.data(), state.bytes.size()});
    CHECK(structure);
    return *structure;
}

CachePolicy policy_of(const StateBuilder &state, int32_t window = 0, bool is_recurrent = false) {
    CachePolicy policy(window, is_recurrent);
    CHECK(policy.format() == CachePolicy::Format::Unseen);
    CHECK(policy.save_mode(KVF_SAVE_AUTO) == KVF_SAVE_SNAPSHOT); // nothing is known
    policy.note_parts(parse(state));
    return policy;
}

const StateBuilder kPlain = StateBuilder().attention({});
const StateBuilder kTwoKinds = StateBuilder().attention({}).attention({});
const StateBuilder kHybrid = StateBuilder().attention({}).recurrent({});

void plain_attention_is_saved_in_place() {
    CachePolicy policy = policy_of(kPlain);
    CHECK(policy.appends_only() && policy.tells_rows() && policy.keeps_first_position());
    CHECK(!policy.gives_cells_away() && !policy.moves_during_call() && !policy.seals_states());
    CHECK(policy.save_mode(KVF_SAVE_AUTO) == KVF_SAVE_IN_PLACE);
    CHECK(policy.save_mode(KVF_SAVE_SNAPSHOT) == KVF_SAVE_SNAPSHOT);
    CHECK(policy.kind() == "attention" && policy.format_name() == "unseen");
    policy.note_known(parse(kPlain));
    CHECK(policy.format() == CachePolicy::Format::Known && policy.format_name() == "framed");
}

void what_the_next_decode_overwrites_is_copied_aside() {
    for (const CachePolicy &policy :
         {policy_of(kHybrid), policy_of(kPlain, 0, true), policy_of(kTwoKinds, 32)}) {
        CHECK(!policy.appends_only());
        CHECK(policy.save_mode(KVF_SAVE_AUTO) == KVF_SAVE_SNAPSHOT);
        CHECK(policy.save_mode(KVF_SAVE_IN_PLACE) == KVF_SAVE_IN_PLACE);
    }
    CHECK(policy_of(kTwoKinds, 32).gives_cells_away());
    CHECK(!policy_of(kTwoKinds, 32).keeps_first_position());
    CHECK(policy_of(kHybrid).tells_rows());
    CHECK(!policy_of(kTwoKinds).tells_rows());
}

void an_opaque_cache_is_moved_during_the_call() {
    CachePolicy policy = policy_of(kPlain);
    policy.note_opaque();
    CHECK(policy.is_opaque() && policy.moves_during_call() && policy.seals_states());
    CHECK(!policy.appends_only() && !policy.tells_rows());
    CHECK(policy.kind() == "unknown" && policy.format_name() == "opaque");
}

void only_a_window_may_be_empty() {
    const Structure without_second =
        parse(StateBuilder().attention({.cells = 3}).attention({.cells = 0}));
    CHECK(policy_of(kTwoKinds).lacks_cells(without_second));
    CHECK(!policy_of(kTwoKinds, 32).lacks_cells(without_second));
    CHECK(!policy_of(kTwoKinds).lacks_cells(parse(kTwoKinds)));
}

} // namespace

int main() {
    plain_attention_is_saved_in_place();
    what_the_next_decode_overwrites_is_copied_aside();
    an_opaque_cache_is_moved_during_the_call();
    only_a_window_may_be_empty();
}
