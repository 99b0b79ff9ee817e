// A state that is cut anywhere is joined to the same cells, and damaged parts are refused or give a
// state that can be cut again: nothing is read or written outside of what the caller names.
#include "kvferry.h"

#include "states.hpp"

namespace {

using Bytes = std::vector<unsigned char>;

struct Parts {
    std::vector<kvf_block> blocks;
    std::vector<Bytes> memory;
    Bytes checkpoint;

    // Copies of exactly their sizes, so that the sanitizers see what is read behind them.
    void name_memory() {
        for (size_t i = 0; i < blocks.size(); ++i) {
            memory[i].shrink_to_fit();
            blocks[i].buffer = memory[i].empty() ? nullptr : memory[i].data();
            blocks[i].bytes = memory[i].size();
        }
    }
};

Parts any_ranges(Input &input) {
    Parts parts;
    // Small numbers are the likely ones, and the states have few cells.
    int32_t position = static_cast<int32_t>(input.below(16) / 15);
    for (uint64_t count = 1 + input.below(3); count > 0; --count) {
        if (input.below(16) > 13) position += static_cast<int32_t>(input.below(3));
        const auto end =
            position + static_cast<int32_t>(input.below(64) < 63 ? 1 + input.below(3) : 0);
        parts.blocks.push_back({nullptr, 0, position, end});
        position = end;
    }
    parts.memory.resize(parts.blocks.size());
    return parts;
}

int32_t cut(const Bytes &state, Parts &parts, const kvf_state_options &options) {
    const auto call = [&](unsigned char *checkpoint, uint64_t *bytes) {
        return kvf_state_cut(state.data(), state.size(), parts.blocks.data(), sizeof(kvf_block),
                             static_cast<uint32_t>(parts.blocks.size()), checkpoint, bytes,
                             &options);
    };
    uint64_t bytes = 0;
    const int32_t sized = call(nullptr, &bytes);
    if (sized != KVF_OK) return sized;
    CHECK(bytes <= state.size());
    parts.checkpoint.assign(bytes, 0xee);
    for (size_t i = 0; i < parts.blocks.size(); ++i) {
        CHECK(parts.blocks[i].bytes <= state.size());
        parts.memory[i].assign(parts.blocks[i].bytes, 0xee);
    }
    parts.name_memory();
    CHECK(call(bytes ? parts.checkpoint.data() : nullptr, &bytes) == KVF_OK);
    CHECK(bytes == parts.checkpoint.size());
    return KVF_OK;
}

int32_t join(const Parts &parts, Bytes &state, const kvf_state_options &options) {
    const Bytes checkpoint(parts.checkpoint);
    const auto call = [&](unsigned char *memory, uint64_t *bytes) {
        return kvf_state_join(parts.blocks.data(), sizeof(kvf_block),
                              static_cast<uint32_t>(parts.blocks.size()),
                              checkpoint.empty() ? nullptr : checkpoint.data(), checkpoint.size(),
                              memory, bytes, &options);
    };
    uint64_t bytes = 0;
    const int32_t sized = call(nullptr, &bytes);
    if (sized != KVF_OK) return sized;
    uint64_t most = parts.checkpoint.size();
    for (const Bytes &memory : parts.memory) most += memory.size();
    CHECK(bytes > 0 && bytes <= most);
    state.assign(bytes, 0xee);
    CHECK(call(state.data(), &bytes) == KVF_OK);
    CHECK(bytes == state.size());
    return KVF_OK;
}

// What was joined is cut into what it was joined of.
void check_cut_again(const Bytes &state, const Parts &parts, const kvf_state_options &options) {
    Parts again = parts;
    for (kvf_block &block : again.blocks) block.buffer = nullptr;
    if (cut(state, again, options) != KVF_OK) return; // several formats describe it, for instance
    for (size_t i = 0; i < parts.blocks.size(); ++i)
        CHECK(again.memory[i].size() == parts.memory[i].size());
    CHECK(again.checkpoint.size() == parts.checkpoint.size());
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    Input input(data, size);
    kvf_state_options options = KVF_STATE_OPTIONS_INIT;
    options.parts_in_blocks = static_cast<uint32_t>(input.below(3));
    Parts parts = any_ranges(input);
    const bool damage_state = input.below(8) > 5;
    const uint64_t damaged = input.below(parts.blocks.size() + 1);
    Bytes state = any_state(input).bytes;
    if (damage_state) damage(input, state);
    state.shrink_to_fit();
    if (cut(state, parts, options) != KVF_OK) return 0;

    Bytes joined;
    if (join(parts, joined, options) == KVF_OK) check_cut_again(joined, parts, options);
    // Once more with a part that is damaged.
    damage(input, damaged < parts.memory.size() ? parts.memory[damaged] : parts.checkpoint);
    parts.checkpoint.shrink_to_fit();
    parts.name_memory();
    if (join(parts, joined, options) == KVF_OK) check_cut_again(joined, parts, options);
    return 0;
}
