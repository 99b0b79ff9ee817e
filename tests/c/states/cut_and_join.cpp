// States are cut into blocks and a checkpoint, and these are joined to states, on plain memory.
// What a block must be is written by the same writer as the state, for the positions of the block
// alone.
#include "kvferry.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "check.hpp"
#include "state_builder.hpp"

namespace {

using Attention = StateBuilder::Attention;
using Bytes = std::vector<unsigned char>;
using Format = StateBuilder::Format;

const Format kFormats[] = {
    {.framed = false},
    {.framed = false, .cell_words = 2},
    {},
    {.cell_words = 2},
    {.cell_words = 3},
    {.rotation_words = 2},
    {.cell_words = 3, .rotation_words = 2},
};

// What a cache consists of; a state of it, and its parts.
struct Cache {
    Format format;
    std::vector<Attention> parts; // that keep every token
    bool window = false;
    bool recurrent = false;

    StateBuilder blocks(const std::vector<int32_t> &positions) const {
        StateBuilder state(format);
        for (Attention part : parts) {
            part.positions = positions;
            state.attention(part);
        }
        return state;
    }
    // What stands behind the parts, at this position.
    void add_rest(StateBuilder &state, int32_t position) const {
        if (window) state.attention({.cells = 2, .row = 16, .position = position - 1});
        if (recurrent) state.recurrent({.position = position});
    }
    Bytes state(const std::vector<int32_t> &positions) const {
        StateBuilder state = blocks(positions);
        add_rest(state, *std::max_element(positions.begin(), positions.end()));
        return state.bytes;
    }
    Bytes checkpoint(int32_t position) const {
        if (!window && !recurrent) return {};
        StateBuilder state(format);
        add_rest(state, position);
        return state.bytes;
    }
};

std::vector<Cache> caches() {
    std::vector<Cache> all;
    for (const Format &format : kFormats) {
        for (const bool transposed : {false, true}) {
            for (const auto &[window, recurrent] :
                 {std::pair{false, false}, {true, false}, {false, true}, {true, true}}) {
                all.push_back({format, {{.transposed = transposed}}, window, recurrent});
            }
            all.push_back({format, {{.streams = 3, .stream = 1, .transposed = transposed}}});
        }
        all.push_back({format, {{.values = false}}});
        all.push_back({format, {{.layers = 1, .row = 34}, {.layers = 3, .row = 8}}});
    }
    return all;
}

// Blocks with memory, each of exactly the size that the array names.
struct Blocks {
    explicit Blocks(const std::vector<std::pair<int32_t, int32_t>> &ranges) {
        for (const auto &[begin, end] : ranges) array.push_back({nullptr, 0, begin, end});
        memory.resize(ranges.size());
    }
    void allocate() {
        for (size_t i = 0; i < array.size(); ++i) {
            memory[i].assign(array[i].bytes, 0xee);
            array[i].buffer = memory[i].data();
        }
    }
    void set(size_t index, const Bytes &bytes) {
        memory[index] = bytes;
        array[index].buffer = memory[index].data();
        array[index].bytes = bytes.size();
    }
    uint32_t count() const { return static_cast<uint32_t>(array.size()); }

    std::vector<kvf_block> array;
    std::vector<Bytes> memory;
};

kvf_state_options options_for(const Cache &cache) {
    kvf_state_options options = KVF_STATE_OPTIONS_INIT;
    options.parts_in_blocks = static_cast<uint32_t>(cache.parts.size());
    return options;
}

int32_t cut(const Cache &cache, const Bytes &state, Blocks &blocks, void *checkpoint,
            uint64_t *bytes) {
    const kvf_state_options options = options_for(cache);
    return kvf_state_cut(state.data(), state.size(), blocks.array.data(), sizeof(kvf_block),
                         blocks.count(), checkpoint, bytes, &options);
}

int32_t join(const Cache &cache, const Blocks &blocks, const Bytes &checkpoint, void *state,
             uint64_t *bytes) {
    const kvf_state_options options = options_for(cache);
    return kvf_state_join(blocks.array.data(), sizeof(kvf_block), blocks.count(),
                          checkpoint.empty() ? nullptr : checkpoint.data(), checkpoint.size(),
                          state, bytes, &options);
}

Bytes joined(const Cache &cache, const Blocks &blocks, const Bytes &checkpoint) {
    uint64_t bytes = 0;
    CHECK(join(cache, blocks, checkpoint, nullptr, &bytes) == KVF_OK);
    Bytes state(bytes, 0xee);
    CHECK(join(cache, blocks, checkpoint, state.data(), &bytes) == KVF_OK);
    CHECK(bytes == state.size());
    return state;
}

// Positions 5 to 14, in order or not.
const std::vector<int32_t> kInOrder{5, 6, 7, 8, 9, 10, 11, 12, 13, 14};
const std::vector<int32_t> kMixed{12, 13, 5, 14, 7, 6, 8, 9, 11, 10};
const std::vector<std::pair<int32_t, int32_t>> kRanges{{5, 8}, {8, 9}, {9, 15}};

std::vector<int32_t> those_in(const std::vector<int32_t> &positions, int32_t begin, int32_t end) {
    std::vector<int32_t> some;
    for (const int32_t position : positions)
        if (begin <= position && position < end) some.push_back(position);
    return some;
}

void every_cache_is_cut_and_joined() {
    for (const Cache &cache : caches()) {
        for (const auto &positions : {kInOrder, kMixed}) {
            const Bytes state = cache.state(positions);
            const Bytes rest = cache.checkpoint(14);
            Blocks blocks(kRanges);
            uint64_t bytes = 99;
            CHECK(cut(cache, state, blocks, nullptr, &bytes) == KVF_OK); // sized only
            CHECK(bytes == rest.size());
            blocks.allocate();
            Bytes checkpoint(rest.size(), 0xee);
            CHECK(cut(cache, state, blocks, checkpoint.data(), &bytes) == KVF_OK);
            CHECK(bytes == rest.size() && checkpoint == rest);
            std::vector<int32_t> in_blocks;
            for (size_t i = 0; i < kRanges.size(); ++i) {
                const auto these = those_in(positions, kRanges[i].first, kRanges[i].second);
                CHECK(blocks.memory[i] == cache.blocks(these).bytes);
                in_blocks.insert(in_blocks.end(), these.begin(), these.end());
            }
            CHECK(joined(cache, blocks, checkpoint) == cache.state(in_blocks));
        }
    }
}

// Two formats describe a block of one cell where the layers that keep every token have no tensors.
void blocks_of_one_cell_without_tensors_are_joined() {
    const std::vector<std::pair<int32_t, int32_t>> begins_with_one{{5, 6}, {6, 7}, {7, 15}};
    const std::vector<std::pair<int32_t, int32_t>> ends_with_one{{5, 14}, {14, 15}};
    const std::vector<std::pair<int32_t, int32_t>> all_of_one{{5, 6}, {6, 7}, {7, 8}};
    for (const Format &format : kFormats) {
        for (const bool recurrent : {false, true}) {
            const Cache cache{format, {{.layers = 0}}, true, recurrent};
            for (const auto &ranges : {begins_with_one, ends_with_one, all_of_one}) {
                Blocks blocks(ranges);
                const std::vector<int32_t> positions =
                    those_in(kInOrder, ranges.front().first, ranges.back().second);
                for (size_t i = 0; i < ranges.size(); ++i) {
                    const auto these = those_in(kInOrder, ranges[i].first, ranges[i].second);
                    blocks.set(i, cache.blocks(these).bytes);
                }
                const Bytes checkpoint = cache.checkpoint(positions.back());
                CHECK(joined(cache, blocks, checkpoint) == cache.state(positions));
            }
        }
        // Without a checkpoint the other blocks tell the format; one block is the state.
        const Cache cache{format, {{.layers = 0}}};
        Blocks two({{5, 6}, {6, 15}});
        two.set(0, cache.blocks({5}).bytes);
        two.set(1, cache.blocks(those_in(kInOrder, 6, 15)).bytes);
        CHECK(joined(cache, two, {}) == cache.state(kInOrder));
        Blocks one({{5, 6}});
        one.set(0, cache.blocks({5}).bytes);
        CHECK(joined(cache, one, {}) == cache.blocks({5}).bytes);
    }
    // Nothing tells whose format this is, and the formats make different states.
    const Cache cache{{.cell_words = 0, .rotation_words = 2}, {{.layers = 0}}};
    Blocks blocks({{5, 6}, {6, 7}});
    blocks.set(0, cache.blocks({5}).bytes);
    blocks.set(1, cache.blocks({6}).bytes);
    uint64_t bytes = 0;
    CHECK(join(cache, blocks, {}, nullptr, &bytes) == KVF_ERR_UNSUPPORTED);
    // A block of another cache is refused as elsewhere.
    const Cache other{{.rotation_words = 2}, {{.layers = 3}}};
    blocks.set(1, other.blocks({6}).bytes);
    CHECK(join(cache, blocks, {}, nullptr, &bytes) == KVF_ERR_STATE_MISMATCH);
}

void some_blocks_alone_are_cut() {
    const Cache cache{{.rotation_words = 2}, {{.transposed = true}}, true};
    const Bytes state = cache.state(kMixed);
    Blocks blocks({{0, 6}, {7, 8}, {9, 11}, {13, 1000}});
    CHECK(cut(cache, state, blocks, nullptr, nullptr) == KVF_OK);
    blocks.allocate();
    blocks.array[2].buffer = nullptr; // sized only
    CHECK(cut(cache, state, blocks, nullptr, nullptr) == KVF_OK);
    CHECK(blocks.memory[0] == cache.blocks({5}).bytes);
    CHECK(blocks.memory[1] == cache.blocks({7}).bytes);
    CHECK(blocks.memory[2] == Bytes(blocks.array[2].bytes, 0xee));
    CHECK(blocks.array[2].bytes == cache.blocks({9, 10}).bytes.size());
    CHECK(blocks.memory[3] == cache.blocks({13, 14}).bytes);
    // No block: the checkpoint alone.
    Blocks none({});
    uint64_t bytes = 0;
    CHECK(cut(cache, state, none, nullptr, &bytes) == KVF_OK);
    Bytes checkpoint(bytes);
    CHECK(cut(cache, state, none, checkpoint.data(), &bytes) == KVF_OK);
    CHECK(checkpoint == cache.checkpoint(14));
}

void nothing_is_written_where_room_is_missing() {
    const Cache cache{{}, {{}}, true};
    const Bytes state = cache.state(kInOrder);
    Blocks blocks(kRanges);
    uint64_t bytes = 0;
    CHECK(cut(cache, state, blocks, nullptr, &bytes) == KVF_OK);
    blocks.allocate();
    Bytes checkpoint(bytes, 0xee);
    const auto sizes = blocks.array;
    --blocks.array[1].bytes;
    CHECK(cut(cache, state, blocks, checkpoint.data(), &bytes) == KVF_ERR_BUFFER_TOO_SMALL);
    CHECK(blocks.array[1].bytes == sizes[1].bytes && bytes == checkpoint.size());
    --bytes;
    CHECK(cut(cache, state, blocks, checkpoint.data(), &bytes) == KVF_ERR_BUFFER_TOO_SMALL);
    CHECK(bytes == checkpoint.size());
    for (const Bytes &memory : blocks.memory) CHECK(memory == Bytes(memory.size(), 0xee));
    CHECK(checkpoint == Bytes(checkpoint.size(), 0xee));

    CHECK(cut(cache, state, blocks, checkpoint.data(), &bytes) == KVF_OK);
    Bytes whole(state.size() - 1, 0xee);
    bytes = whole.size();
    CHECK(join(cache, blocks, checkpoint, whole.data(), &bytes) == KVF_ERR_BUFFER_TOO_SMALL);
    CHECK(bytes == state.size() && whole == Bytes(whole.size(), 0xee));
}

void what_cannot_be_cut() {
    const Cache cache{{}, {{}}, true};
    const Bytes state = cache.state(kInOrder);
    const auto refused = [&](const std::vector<std::pair<int32_t, int32_t>> &ranges,
                             const Bytes &bytes, int32_t status) {
        Blocks blocks(ranges);
        CHECK(cut(cache, bytes, blocks, nullptr, nullptr) == status);
    };
    refused({{5, 5}}, state, KVF_ERR_INVALID_ARGUMENT);
    refused({{8, 5}}, state, KVF_ERR_INVALID_ARGUMENT);
    refused({{-3, 8}}, state, KVF_ERR_INVALID_ARGUMENT);
    refused({{5, 8}, {7, 9}}, state, KVF_ERR_INVALID_ARGUMENT);
    refused({{8, 9}, {5, 8}}, state, KVF_ERR_INVALID_ARGUMENT);
    refused({{0, 5}}, state, KVF_ERR_SEQUENCE_EMPTY);
    refused({{5, 8}, {15, 20}}, state, KVF_ERR_SEQUENCE_EMPTY);
    refused({{5, 8}}, {state.begin(), state.end() - 1}, KVF_ERR_STATE_DAMAGED);
    refused({{5, 8}}, StateBuilder().recurrent({}).bytes, KVF_ERR_UNSUPPORTED);
    refused({{5, 8}}, StateBuilder().attention({.cells = 0}).bytes, KVF_ERR_UNSUPPORTED);

    Blocks blocks({{5, 8}});
    kvf_state_options options = KVF_STATE_OPTIONS_INIT;
    char error[64];
    options.error = error;
    options.error_size = sizeof error;
    options.parts_in_blocks = 3;
    const auto with = [&](uint64_t block_size) {
        return kvf_state_cut(state.data(), state.size(), blocks.array.data(), block_size, 1,
                             nullptr, nullptr, &options);
    };
    CHECK(with(sizeof(kvf_block)) == KVF_ERR_UNSUPPORTED);
    CHECK(std::strlen(error) > 0);
    CHECK(with(sizeof(kvf_block) - 1) == KVF_ERR_STRUCT_SIZE);
    CHECK(with(0) == KVF_ERR_STRUCT_SIZE);
}

void what_cannot_be_joined() {
    for (const bool window : {false, true}) {
        const Cache cache{{}, {{}}, window};
        const Bytes checkpoint = cache.checkpoint(14);
        const auto refused = [&](const Blocks &blocks, const Bytes &given, int32_t status) {
            uint64_t bytes = 0;
            CHECK(join(cache, blocks, given, nullptr, &bytes) == status);
        };
        const auto make = [&](const std::vector<std::pair<int32_t, int32_t>> &ranges) {
            Blocks blocks(ranges);
            for (size_t i = 0; i < ranges.size(); ++i) {
                const auto these = those_in(kInOrder, ranges[i].first, ranges[i].second);
                blocks.set(i, cache.blocks(these).bytes);
            }
            return blocks;
        };
        CHECK(joined(cache, make(kRanges), checkpoint) == cache.state(kInOrder));
        refused(make({}), checkpoint, KVF_ERR_INVALID_ARGUMENT);
        refused(make({{5, 8}, {9, 15}}), checkpoint, KVF_ERR_INVALID_ARGUMENT);
        refused(make({{8, 15}, {5, 8}}), checkpoint, KVF_ERR_INVALID_ARGUMENT);
        refused(make({{5, 8}, {5, 8}, {8, 15}}), checkpoint, KVF_ERR_INVALID_ARGUMENT);
        refused(make({{5, 9}, {8, 15}}), checkpoint, KVF_ERR_INVALID_ARGUMENT);

        Blocks exchanged = make(kRanges);
        exchanged.set(0, cache.blocks({9, 10, 11}).bytes);
        refused(exchanged, checkpoint, KVF_ERR_STATE_DAMAGED);
        Blocks twice = make(kRanges); // as after llama_memory_seq_div()
        twice.set(0, cache.blocks({5, 6, 6}).bytes);
        CHECK(joined(cache, twice, checkpoint) == cache.state({5, 6, 6, 8, 9, 10, 11, 12, 13, 14}));
        Blocks cut_off = make(kRanges);
        cut_off.memory[1].pop_back();
        --cut_off.array[1].bytes;
        refused(cut_off, checkpoint, KVF_ERR_STATE_DAMAGED);

        const std::vector<Cache> others = {
            {{.rotation_words = 2}, {{}}, window},  {{.framed = false}, {{}}, window},
            {{}, {{.layers = 3}}, window},          {{}, {{.row = 64}}, window},
            {{}, {{.type = 8, .row = 32}}, window}, {{}, {{.transposed = true}}, window},
            {{}, {{.streams = 2}}, window}};
        for (const Cache &other : others) {
            Blocks mixed = make(kRanges);
            mixed.set(1, other.blocks({8}).bytes);
            refused(mixed, checkpoint, KVF_ERR_STATE_MISMATCH);
        }
        if (!window) continue;
        refused(make(kRanges), cache.checkpoint(13), KVF_ERR_STATE_DAMAGED);
        refused(make(kRanges), cache.checkpoint(15), KVF_ERR_STATE_DAMAGED);
        refused(make(kRanges), {checkpoint.begin(), checkpoint.end() - 1}, KVF_ERR_STATE_DAMAGED);
        const Cache other{{.rotation_words = 2}, {{}}, window};
        refused(make(kRanges), other.checkpoint(14), KVF_ERR_STATE_MISMATCH);
    }
}

} // namespace

int main() {
    every_cache_is_cut_and_joined();
    blocks_of_one_cell_without_tensors_are_joined();
    some_blocks_alone_are_cut();
    nothing_is_written_where_room_is_missing();
    what_cannot_be_cut();
    what_cannot_be_joined();
}
