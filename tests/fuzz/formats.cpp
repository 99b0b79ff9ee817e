// The walk through a state reads nothing outside of it, ends, and takes no damaged length for
// whole.
#include "states/cells.h"
#include "states/writer.h"

#include "states.hpp"

using namespace kvf;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    Input input(data, size);
    StateBuilder state;
    if (input.number<uint8_t>() % 4 == 0) {
        state.bytes.insert(state.bytes.end(), input.rest(), input.rest() + input.left());
    } else {
        state = any_state(input);
        damage(input, state.bytes);
    }
    const std::vector<unsigned char> exact(state.bytes);
    const StateView view{exact.data(), exact.size()};
    const auto structure = parse_state(view);
    if (!structure) return 0;

    CHECK(!structure->sections.empty() && structure->tensor_bytes < exact.size());
    CHECK(structure->cells() <= exact.size() / 12);
    CHECK(mismatch(*structure, *structure).empty());
    uint64_t last = 0;
    for (const ByteRange &range :
         bytes_free_for_others(*structure, view, 1 + static_cast<int32_t>(input.below(9)))) {
        CHECK(last <= range.begin && range.begin <= range.end && range.end <= exact.size());
        last = range.end;
    }
    if (!structure->format || !structure->has_cells_everywhere()) return 0;
    const auto one_cell = make_state_of_one_cell(*structure);
    CHECK(parse_state({one_cell.data(), one_cell.size()}, &*structure));
    return 0;
}
