// Which states are taken for whole, and which caches they fit. (Damaged at random:
// fuzz/formats.cpp.)
#include "states/cells.h"
#include "states/writer.h"

#include "check.hpp"
#include "state_builder.hpp"

using namespace kvf;
using Attention = StateBuilder::Attention;
using Recurrent = StateBuilder::Recurrent;

namespace {

using Format = StateBuilder::Format;

// Every combination that a libllama was seen to write, and the name that it has here.
const std::pair<const char *, Format> kSeen[] = {
    {"unframed", {.framed = false}},
    {"unframed-2d", {.framed = false, .cell_words = 2}},
    {"framed", {}},
    {"framed-2d", {.cell_words = 2}},
    {"framed-2d-token", {.cell_words = 3}},
    {"rotated", {.rotation_words = 2}},
    {"rotated-2d-token", {.cell_words = 3, .rotation_words = 2}},
};

// A copy that ends where the state ends, so that the sanitizers see what is read behind it.
std::optional<Structure> parse(const std::vector<unsigned char> &bytes,
                               const Structure *like = nullptr) {
    const std::vector<unsigned char> exact(bytes);
    return parse_state({exact.data(), exact.size()}, like);
}

Structure whole(const StateBuilder &state) {
    const auto structure = parse(state.bytes);
    CHECK(structure);
    CHECK(structure->tensor_bytes == state.tensor_bytes);
    CHECK(mismatch(*structure, *structure).empty());
    // Cut or continued anywhere it is none, or plainly one of another kind of cache.
    const auto refused = [&](const std::vector<unsigned char> &bytes) {
        const auto other = parse(bytes);
        return !other || !mismatch(*other, *structure).empty();
    };
    for (size_t n = 0; n < state.bytes.size(); ++n)
        CHECK(refused({state.bytes.begin(), state.bytes.begin() + static_cast<long>(n)}));
    for (const size_t more : {1u, 3u, 4u, 8u}) {
        auto longer = state.bytes;
        longer.resize(longer.size() + more);
        CHECK(refused(longer));
    }
    return *structure;
}

StateBuilder attention(const Attention &a) { return StateBuilder().attention(a); }

void every_kind() {
    const Structure plain = whole(attention({}));
    CHECK(plain.kind() == "attention" && plain.cells() == 3);
    CHECK(plain.sections[0].layers == 2 && plain.sections[0].tensors.size() == 4);
    CHECK((plain.sections[0].tensors[0] == TensorShape{1, 32, 0}));

    CHECK(whole(attention({.transposed = true})).sections[0].transposed);
    CHECK(whole(attention({.values = false})).sections[0].tensors.size() == 2);
    CHECK(whole(attention({.streams = 4, .stream = 2})).sections[0].streams == 4);
    CHECK(whole(attention({.cells = 1, .layers = 1, .row = 2})).cells() == 1);

    const Structure window = whole(StateBuilder().attention({.cells = 5}).attention({.cells = 2}));
    CHECK(window.kind() == "attention+attention" && window.cells() == 5);
    const Structure mamba = whole(StateBuilder().recurrent({}));
    CHECK(mamba.kind() == "recurrent" && mamba.cells() == 1);
    const Structure hybrid = whole(StateBuilder().attention({}).recurrent({}));
    CHECK(hybrid.kind() == "attention+recurrent");
    CHECK(whole(StateBuilder().attention({}).recurrent({.layers_with_r = 1, .layers_with_s = 1}))
              .sections[1]
              .tensors.size() == 2);
    CHECK(whole(StateBuilder().attention({}).attention({}).recurrent({})).sections.size() == 3);
}

void every_format() {
    for (const auto &[name, format] : kSeen) {
        const auto write = [&format] { return StateBuilder(format); };
        const Structure plain = whole(write().attention({}));
        CHECK(plain.format && std::string(plain.format->name) == name);
        CHECK(plain.framed == format.framed);
        const Structure latent = whole(write().attention({.values = false}));
        CHECK(latent.format == plain.format && latent.sections[0].tensors.size() == 2);
        CHECK(whole(write().attention({.transposed = true})).format == plain.format);
        const Structure all = whole(write().attention({.cells = 5}).attention({}).recurrent({}));
        CHECK(all.format == plain.format && all.sections.size() == 3);
        // Without cells all formats of a frame read the same.
        CHECK(!parse(write().attention({.cells = 0}).bytes)->format);
    }
}

// A recurrent section in the middle ends where only the cache's own states tell.
void recurrent_in_the_middle() {
    const auto write = [](uint32_t cells) {
        return StateBuilder(Format{.rotation_words = 2})
            .attention({.cells = 3 * cells})
            .recurrent({.cells = cells})
            .attention({.cells = 3 * cells, .values = false});
    };
    const auto skeleton = parse(write(0).bytes);
    CHECK(skeleton && skeleton->kind() == "attention+recurrent+attention");
    const auto state = parse(write(1).bytes, &*skeleton);
    CHECK(state && state->has_cells_everywhere());
    CHECK(mismatch(*state, *skeleton).empty());
}

// What a state of one cell is written in is what the state was read in.
void states_of_one_cell() {
    for (const auto &[name, format] : kSeen) {
        for (const bool transposed : {false, true}) {
            const Attention base{
                .streams = 3, .stream = 1, .transposed = transposed, .rotation = 9};
            const auto state =
                StateBuilder(format).attention(base).attention({.values = false}).recurrent({});
            const Structure structure = whole(state);
            const auto bytes = make_state_of_one_cell(structure);
            const auto again = parse(bytes);
            CHECK(again && again->format == structure.format && again->cells() == 1);
            CHECK(again->has_cells_everywhere() && mismatch(*again, structure).empty());
        }
    }
}

bool refused_position(int32_t position, int32_t last) {
    const auto state = attention({.cells = 1, .position = position});
    const std::vector<unsigned char> exact(state.bytes);
    return !parse_state({exact.data(), exact.size(), last});
}

void positions() {
    CHECK(!refused_position(100, 100));
    CHECK(refused_position(101, 100));
    CHECK(refused_position(0x7ffffffe, 1 << 24));
    CHECK(refused_position(0x7fffffff, 0x7ffffffe));
    CHECK(refused_position(-1, 100));
}

bool agrees(const std::vector<Attention> &sections) {
    StateBuilder state;
    for (const Attention &section : sections) state.attention(section);
    return positions_agree(*parse(state.bytes), {state.bytes.data(), state.bytes.size()});
}

void positions_of_several_sections() {
    CHECK(agrees({{.cells = 5}}));
    CHECK(agrees({{.cells = 5}, {.cells = 5}}));
    CHECK(agrees({{.cells = 5, .position = 10}, {.cells = 2, .position = 13}}));
    CHECK(agrees({{.cells = 5, .position = 10}, {.cells = 2, .position = 10}})); // the end removed
    CHECK(agrees({{.cells = 5}, {.cells = 0}}));
    CHECK(!agrees({{.cells = 5, .position = 10}, {.cells = 2, .position = 14}}));
    CHECK(!agrees({{.cells = 5, .position = 10}, {.cells = 1, .position = 9}}));
    CHECK(!agrees({{.cells = 5}, {.cells = 5}, {.cells = 1, .position = 7}}));
    // A recurrent cell may be anywhere.
    StateBuilder state = attention({.cells = 5}).recurrent({});
    CHECK(positions_agree(*parse(state.bytes), {state.bytes.data(), state.bytes.size()}));
}

// Of windows of every kind, the cells that llama.cpp may give away before the sequence's next token
// is decoded.
std::vector<ByteRange> free_for_others(const StateBuilder &state, int32_t window) {
    const Structure structure = *parse(state.bytes);
    return bytes_free_for_others(structure, {state.bytes.data(), state.bytes.size()}, window);
}

void cells_free_for_others() {
    // Positions 10 to 17, the window of 8 still sees all of them, but of 18 no longer that of 10.
    const auto window = attention({.cells = 8, .layers = 1, .row = 16, .position = 10});
    const uint64_t keys = parse(window.bytes)->sections[0].tensor_at[0];
    const auto ranges = free_for_others(window, 8);
    // Of K and of V: the first cell; and that at 14, were the window symmetric.
    CHECK(ranges.size() == 4);
    CHECK(ranges[0].begin == keys && ranges[0].end == keys + 16);
    CHECK(ranges[1].begin == keys + 3 * 16 && ranges[1].end == keys + 4 * 16);
    for (size_t i = 1; i < ranges.size(); ++i) CHECK(ranges[i - 1].end <= ranges[i].begin);

    CHECK(free_for_others(window, 0).empty());    // no windows at all
    CHECK(free_for_others(window, 1000).empty()); // all of it stays inside
    // A stream of its own, where no other sequence has cells.
    CHECK(free_for_others(attention({.streams = 2, .cells = 8, .position = 10}), 8).empty());
    // One that keeps every token.
    CHECK(free_for_others(attention({.cells = 40}), 8).empty());
    // But of two attention sections the last is the window's, which earlier releases save with what
    // it has left behind.
    StateBuilder both;
    both.attention({.cells = 40, .layers = 1}).attention({.cells = 40, .layers = 1});
    const auto left_behind = free_for_others(both, 8);
    const Section last = parse(both.bytes)->sections[1];
    CHECK(left_behind.size() == 2); // of K and of V
    CHECK(left_behind[0].begin == last.tensor_at[0]);
    CHECK(left_behind[0].end - left_behind[0].begin == 40 * 32); // were it chunked: all
    CHECK(left_behind[1].begin == last.tensor_at[1]);
    // Those had no frame. Of a chunk that has begun, all before it.
    StateBuilder early({.framed = false});
    early.attention({.cells = 9, .layers = 1}).attention({.cells = 6, .layers = 1, .position = 4});
    const auto chunk_before = free_for_others(early, 8);
    CHECK(chunk_before.size() == 2);
    CHECK(chunk_before[0].begin == parse(early.bytes)->sections[1].tensor_at[0]);
    CHECK(chunk_before[0].end - chunk_before[0].begin == 4 * 32);
    // Chunks: after the position before a multiple, the whole chunk goes.
    const auto chunk = free_for_others(attention({.cells = 8, .layers = 1, .position = 8}), 8);
    CHECK(!chunk.empty() && chunk[0].end - chunk[0].begin == 8 * 32);
    // V transposed: an element of each row.
    const auto transposed = free_for_others(
        attention({.cells = 8, .layers = 1, .row = 16, .transposed = true, .position = 10}), 8);
    CHECK(transposed.size() == 2 + 2 * 8);
    for (size_t i = 1; i < transposed.size(); ++i)
        CHECK(transposed[i - 1].end <= transposed[i].begin);
    CHECK(transposed[2].end - transposed[2].begin == 2);
}

void empty_sequences() {
    CHECK(parse(attention({.cells = 0}).bytes)->cells() == 0);
    CHECK(parse(attention({.streams = 4, .cells = 0}).bytes)->sections[0].streams == 4);
    CHECK(parse(StateBuilder().recurrent({.cells = 0}).bytes)->kind() == "recurrent");
    CHECK(parse(StateBuilder().attention({.cells = 0}).recurrent({.cells = 0}).bytes)->kind() ==
          "attention+recurrent");
}

void damaged() {
    CHECK(!parse({}));
    CHECK(!parse(StateBuilder().bytes)); // no section at all
    auto state = attention({}).bytes;
    CHECK(!parse({state.begin(), state.begin() + 3}));

    const auto refused = [](size_t at, uint32_t value) {
        auto bytes = attention({}).bytes;
        std::memcpy(bytes.data() + at, &value, sizeof value);
        return !parse(bytes);
    };
    // magic, sequence, streams, cells, {position, sequences, sequence} * 3, transposed, layers,
    // type, row
    CHECK(refused(0, 0x12345678));
    CHECK(refused(8, 0));   // no stream
    CHECK(refused(8, 257)); // more than LLAMA_MAX_SEQ
    CHECK(refused(12, 4));
    CHECK(refused(12, UINT32_MAX));
    CHECK(refused(16, UINT32_MAX)); // a negative position
    CHECK(refused(16, INT32_MAX));
    CHECK(refused(20, 0)); // a cell of no sequence
    CHECK(refused(20, 2));
    CHECK(refused(20, UINT32_MAX));
    CHECK(refused(52, 2)); // transposed: neither yes nor no
    CHECK(refused(56, 3)); // layers
    CHECK(refused(56, UINT32_MAX));
    CHECK(refused(60, 1000)); // a type that ggml has not
    CHECK(refused(60, UINT32_MAX));
    CHECK(refused(64, 31));         // a row's bytes
    CHECK(refused(68, 1));          // ... times cells, above 2^32 and
    CHECK(refused(68, 0x55555556)); // ... around 2^64
    // A position near the largest is refused by the caller's bound: positions().

    // The same sequence in two streams.
    StateBuilder two;
    two.attention({.streams = 2});
    StateBuilder twice;
    twice.add<uint32_t>(2);
    const std::vector<unsigned char> body(two.bytes.begin() + 12, two.bytes.end() - 4);
    for (int i = 0; i < 2; ++i) twice.bytes.insert(twice.bytes.end(), body.begin(), body.end());
    CHECK(!parse(twice.bytes));

    CHECK(!parse(StateBuilder().recurrent({.cells = 2}).bytes));
    CHECK(!parse(
        StateBuilder().recurrent({.layers = 1, .layers_with_r = 2, .layers_with_s = 1}).bytes));
}

// Sections that read the same in several ways must not make the walk explode: its time grows with
// the state's length, whatever is in it. (Some of these took seconds, or for ever, when it went
// back for each of their parts.)
void adversarial() {
    StateBuilder zeros;
    for (int section = 0; section < 7; ++section) zeros.attention({.streams = 256, .cells = 0});
    zeros.add<uint32_t>(99);
    CHECK(!parse(zeros.bytes));
    StateBuilder many;
    for (int section = 0; section < 7; ++section) many.attention({.cells = 4000, .row = 2});
    many.add<uint32_t>(99);
    CHECK(!parse(many.bytes));
    std::vector<unsigned char> ones(1 << 20, 1);
    std::memcpy(ones.data(), many.bytes.data(), 8);
    CHECK(!parse(ones));
    // 96 MiB of recurrent sections without cells, whose layers may end anywhere.
    StateBuilder layers;
    while (layers.bytes.size() < 96 << 20) {
        layers.add<uint32_t>(0).add<uint32_t>(0).add<uint32_t>(4096);
        for (int i = 0; i < 8192; ++i) layers.add<int32_t>(0).add<uint64_t>(0);
    }
    layers.add<uint32_t>(99);
    CHECK(!parse(layers.bytes));
    // Attention sections whose layers have nothing, in every way that a section may have values.
    StateBuilder nothing;
    for (int section = 0; section < 8; ++section)
        nothing.attention({.cells = 1, .layers = 4096, .row = 0});
    nothing.add<uint32_t>(99);
    CHECK(!parse(nothing.bytes));
}

std::string why(const StateBuilder &state, const StateBuilder &cache) {
    return mismatch(*parse(state.bytes), *parse(cache.bytes));
}

void fits_or_not() {
    CHECK(why(attention({.cells = 1}), attention({.cells = 9})).empty());
    CHECK(why(attention({}), attention({.cells = 0})).empty()); // nothing to compare with
    CHECK(why(attention({.cells = 0}), attention({})).empty());
    CHECK(why(attention({}), StateBuilder().recurrent({})).find("kind") != std::string::npos);
    CHECK(!why(attention({}), StateBuilder().attention({}).attention({})).empty());
    CHECK(why(attention({.streams = 2}), attention({})).find("streams") != std::string::npos);
    CHECK(why(attention({.layers = 3}), attention({})).find("layers") != std::string::npos);
    CHECK(why(attention({.transposed = true}), attention({})).find("transposed") !=
          std::string::npos);
    CHECK(why(attention({.type = 8}), attention({})).find("types") != std::string::npos);
    CHECK(why(attention({.row = 64}), attention({})).find("types") != std::string::npos);
    CHECK(!why(attention({.values = false}), attention({})).empty());
    const auto of = [](const Format &format) { return StateBuilder(format).attention({}); };
    for (const auto &[name, format] : kSeen) {
        for (const auto &[other_name, other] : kSeen)
            CHECK(why(of(format), of(other)).empty() == (std::string(name) == other_name));
    }
    const Format rotated{.rotation_words = 2};
    CHECK(why(StateBuilder(rotated).attention({.rotation = 64}), of(rotated)).find("rotated") !=
          std::string::npos);
    CHECK(!why(StateBuilder().recurrent({.s = 32}), StateBuilder().recurrent({})).empty());
    CHECK(why(StateBuilder().recurrent({.cells = 0}), StateBuilder().recurrent({})).empty());
}

} // namespace

int main() {
    every_kind();
    every_format();
    recurrent_in_the_middle();
    states_of_one_cell();
    positions();
    positions_of_several_sections();
    cells_free_for_others();
    empty_sequences();
    damaged();
    adversarial();
    fits_or_not();
}
