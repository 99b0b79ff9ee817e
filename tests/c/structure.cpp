// Which states are taken for whole, and which caches they fit. (Damaged at random: fuzz/structure.cpp.)
#include "structure.h"

#include "check.hpp"
#include "state_writer.hpp"

using namespace kvf;
using Attention = StateWriter::Attention;
using Recurrent = StateWriter::Recurrent;

namespace {

// A copy that ends where the state ends, so that the sanitizers see what is read behind it.
std::optional<Structure> parse(const std::vector<unsigned char> &bytes) {
    const std::vector<unsigned char> exact(bytes);
    return parse_state(exact.data(), exact.size());
}

Structure whole(const StateWriter &state) {
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

StateWriter attention(const Attention &a) { return StateWriter().attention(a); }

void every_kind() {
    const Structure plain = whole(attention({}));
    CHECK(plain.kind() == "attention" && plain.cells() == 3);
    CHECK(plain.sections[0].layers == 2 && plain.sections[0].tensors.size() == 4);
    CHECK((plain.sections[0].tensors[0] == TensorShape{1, 32}));

    CHECK(whole(attention({.transposed = true})).sections[0].transposed);
    CHECK(whole(attention({.values = false})).sections[0].tensors.size() == 2);
    CHECK(whole(attention({.extension = true})).cells() == 3);
    CHECK(whole(attention({.transposed = true, .extension = true})).cells() == 3);
    CHECK(whole(attention({.streams = 4, .stream = 2})).sections[0].streams == 4);
    CHECK(whole(attention({.cells = 1, .layers = 1, .row = 2})).cells() == 1);

    const Structure window = whole(StateWriter().attention({.cells = 5}).attention({.cells = 2}));
    CHECK(window.kind() == "attention+attention" && window.cells() == 5);
    const Structure mamba = whole(StateWriter().recurrent({}));
    CHECK(mamba.kind() == "recurrent" && mamba.cells() == 1);
    const Structure hybrid = whole(StateWriter().attention({}).recurrent({}));
    CHECK(hybrid.kind() == "attention+recurrent");
    CHECK(whole(StateWriter().attention({}).recurrent({.layers_with_r = 1, .layers_with_s = 1}))
              .sections[1]
              .tensors.size() == 2);
    CHECK(whole(StateWriter().attention({}).attention({}).recurrent({})).sections.size() == 3);
}

void empty_sequences() {
    CHECK(parse(attention({.cells = 0}).bytes)->cells() == 0);
    CHECK(parse(attention({.streams = 4, .cells = 0}).bytes)->sections[0].streams == 4);
    CHECK(parse(StateWriter().recurrent({.cells = 0}).bytes)->kind() == "recurrent");
    CHECK(parse(StateWriter().attention({.cells = 0}).recurrent({.cells = 0}).bytes)->kind() ==
          "attention+recurrent");
}

void damaged() {
    CHECK(!parse({}));
    CHECK(!parse(StateWriter().bytes)); // no section at all
    auto state = attention({}).bytes;
    CHECK(has_state_magic(state.data(), state.size()));
    CHECK(!has_state_magic(state.data(), 3));

    const auto refused = [](size_t at, uint32_t value) {
        auto bytes = attention({}).bytes;
        std::memcpy(bytes.data() + at, &value, sizeof value);
        return !parse(bytes);
    };
    // magic, sequence, streams, cells, {position, sequences, sequence} * 3, transposed, layers, type, row
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

    // The same sequence in two streams.
    StateWriter two;
    two.attention({.streams = 2});
    StateWriter twice;
    twice.add<uint32_t>(2);
    const std::vector<unsigned char> body(two.bytes.begin() + 12, two.bytes.end() - 4);
    for (int i = 0; i < 2; ++i) twice.bytes.insert(twice.bytes.end(), body.begin(), body.end());
    CHECK(!parse(twice.bytes));

    CHECK(!parse(StateWriter().recurrent({.cells = 2}).bytes));
    CHECK(!parse(
        StateWriter().recurrent({.layers = 1, .layers_with_r = 2, .layers_with_s = 1}).bytes));
    CHECK(!parse(StateWriter().recurrent({}).attention({}).bytes)); // recurrent sections come last
}

// Sections that read the same in several ways must not make the walk explode.
void adversarial() {
    StateWriter zeros;
    for (int section = 0; section < 7; ++section) zeros.attention({.streams = 256, .cells = 0});
    zeros.add<uint32_t>(99);
    CHECK(!parse(zeros.bytes));
    StateWriter many;
    for (int section = 0; section < 7; ++section) many.attention({.cells = 4000, .row = 2});
    many.add<uint32_t>(99);
    CHECK(!parse(many.bytes));
    std::vector<unsigned char> ones(1 << 20, 1);
    std::memcpy(ones.data(), many.bytes.data(), 8);
    CHECK(!parse(ones));
}

std::string why(const StateWriter &state, const StateWriter &cache) {
    return mismatch(*parse(state.bytes), *parse(cache.bytes));
}

void fits_or_not() {
    CHECK(why(attention({.cells = 1}), attention({.cells = 9})).empty());
    CHECK(why(attention({}), attention({.cells = 0})).empty()); // nothing to compare with
    CHECK(why(attention({.cells = 0}), attention({})).empty());
    CHECK(why(attention({}), StateWriter().recurrent({})).find("kind") != std::string::npos);
    CHECK(why(attention({}), StateWriter().attention({}).attention({})) != "");
    CHECK(why(attention({.streams = 2}), attention({})).find("streams") != std::string::npos);
    CHECK(why(attention({.layers = 3}), attention({})).find("layers") != std::string::npos);
    CHECK(why(attention({.transposed = true}), attention({})).find("transposed") !=
          std::string::npos);
    CHECK(why(attention({.type = 8}), attention({})).find("types") != std::string::npos);
    CHECK(why(attention({.row = 64}), attention({})).find("types") != std::string::npos);
    CHECK(why(attention({.values = false}), attention({})) != "");
    CHECK(why(StateWriter().recurrent({.s = 32}), StateWriter().recurrent({})) != "");
    CHECK(why(StateWriter().recurrent({.cells = 0}), StateWriter().recurrent({})).empty());
}

} // namespace

int main() {
    every_kind();
    empty_sequences();
    damaged();
    adversarial();
    fits_or_not();
}
