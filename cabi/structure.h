// The structure of a state: what llama.cpp writes around the tensor bytes.
//
// libllama trusts the states that it loads: some damaged ones end the process in an assertion, others
// leave cells that can never be freed. So a state is walked through here before libllama sees it. The
// formats are those of llama.cpp's llama-kv-cache.cpp and llama-memory-recurrent.cpp (state_write), as
// of b10361; a state is a magic number, a sequence id, and one section for each part of the memory.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace kvf {

// One tensor's entry: its ggml type and the bytes of one row (of one element, where V is transposed).
struct TensorShape {
    int32_t type;
    uint64_t row;
    bool operator==(const TensorShape &) const = default;
};

struct Section {
    enum class Kind : uint8_t { Attention, Recurrent };
    Kind kind = Kind::Attention;
    uint32_t streams = 1;             // of an attention section
    uint64_t cells = 0;               // over all streams
    bool transposed = false;          // V; known if there are cells
    bool extended = false;            // two more coordinates a cell; known if there are cells
    uint32_t layers = 0;              // known if there are cells, or it is recurrent
    std::vector<TensorShape> tensors; // K then V, or R then S
    bool operator==(const Section &) const = default;
};

struct Structure {
    std::vector<Section> sections;
    uint64_t tensor_bytes = 0;

    uint64_t cells() const;
    bool has_cells_everywhere() const;
    // "attention", "attention+recurrent" ...
    std::string kind() const;
};

// Walks through a state. Nothing where no known format accounts for every byte of it.
std::optional<Structure> parse_state(const unsigned char *state, uint64_t bytes);

// The state has the sequence format's magic number.
bool has_state_magic(const unsigned char *state, uint64_t bytes);

// Why a state with structure `state` cannot belong to a cache whose states look like `cache`; "" if it
// can. Sections without cells say less, and are compared by what they say.
std::string mismatch(const Structure &state, const Structure &cache);

} // namespace kvf
