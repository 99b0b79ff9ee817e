// The formats of a state: what llama.cpp writes around the tensor bytes.
//
// libllama trusts the states that it loads: some damaged states end the process in an assertion,
// others leave cells that can never be freed. So these functions read a state before libllama sees
// it.
//
// llama.cpp does not document its formats, and they differ between releases and models. Each known
// format is a row of one table (formats.cpp), with the builds in which it was seen. The
// state_write() functions of llama.cpp's llama-kv-cache.cpp and llama-memory-recurrent.cpp write
// them. A state is a frame, and one section for each part of the memory. If no row accounts for
// every byte of a state, the state is opaque. It is not called damaged, since its format may be one
// that kvferry does not know (envelope.h guards such states).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace kvf {

// A format: the differences between releases and models. All sections of a state have one format.
struct StateFormat {
    const char *name;
    bool framed;             // a state begins with a magic number and the id of the sequence
    uint32_t cell_words;     // further words of 32 bits in each cell: M-RoPE coordinates, the token
    uint32_t rotation_words; // words of 32 bits after the number of layers: how keys and values are
                             // rotated
    const char *seen;        // the builds, and the models unless it is all of them
};

// One tensor's entry: its ggml type, and the bytes of one row, or of one cell if V is transposed.
struct TensorShape {
    int32_t type;
    uint64_t row;
    uint32_t element; // bytes of one element if V is transposed, otherwise 0
    bool operator==(const TensorShape &) const = default;
};

struct Section {
    enum class Kind : uint8_t { Attention, Recurrent };
    Kind kind = Kind::Attention;
    uint32_t streams = 1;             // of an attention section
    uint32_t stream = 0;              // of them, the one that has the cells
    uint64_t cells = 0;               // over all streams
    bool transposed = false;          // V; known if there are cells
    uint32_t layers = 0;              // known if there are cells, or it is recurrent
    std::vector<uint32_t> rotation;   // known if there are cells
    std::vector<TensorShape> tensors; // K then V, or R then S; known as the layers are

    // Where things are in the state, in bytes from its beginning.
    uint64_t cells_at = 0;           // the first cell
    std::vector<uint64_t> tensor_at; // the bytes of each tensor
};

struct Structure {
    const StateFormat *format = nullptr; // NULL if there are no cells: several are possible then
    bool framed = true;
    std::vector<Section> sections;
    uint64_t tensor_bytes = 0;
    uint64_t bytes = 0; // of the state

    uint64_t cells() const;
    bool has_cells_everywhere() const;
    // Whether the first section, and no other, is one of attention.
    bool has_one_attention_first() const;
    // "attention", "attention+recurrent" ...
    std::string kind() const;
};

// The bytes of a state that is to be read.
struct StateView {
    const unsigned char *data;
    uint64_t bytes;
    int32_t last_position = INT32_MAX - 1; // a state with a larger position is damaged
};

// The bytes of a cell of an attention section: position, number of sequences, further words,
// sequence.
constexpr uint64_t cell_bytes(const StateFormat &format) {
    return (3 + uint64_t{format.cell_words}) * sizeof(uint32_t);
}

constexpr uint32_t kStateMagic = 0xaf143cd8; // io_magic in llama-context.cpp
// The frame: the magic number, and the sequence.
constexpr uint64_t kFrameBytes = 2 * sizeof(uint32_t);

// Reads a state. Returns nothing if no known format accounts for every byte of the state; if
// several formats do, returns the structure by the first one. `like` is the structure of other
// states of this cache, or NULL: the sections that it describes must be as it says. Takes time in
// proportion to the state's metadata, and memory in proportion to the entries that are really
// there.
std::optional<Structure> parse_state(const StateView &state, const Structure *like = nullptr);
// As parse_state(), but returns the structures by all formats that account for the state.
std::vector<Structure> parse_state_in_every_way(const StateView &state,
                                                const Structure *like = nullptr);

// Whether the state is a frame around nothing. libllama writes such a state for a context that uses
// the memory of another context (llama_context_params.ctx_other, from 0.6.0 on).
bool is_frame_alone(const StateView &state);

// Returns why a state with the structure `state` cannot belong to a cache whose states have the
// structure `cache`; "" if it can. A section without cells tells less than one with cells; what it
// tells is compared.
std::string mismatch(const Structure &state, const Structure &cache);

// Returns a hash, in hex, of everything that mismatch() compares. Two structures with cells in
// every section match if and only if their hashes are equal (but for collisions of 64 bits).
std::string layout_hash(const Structure &structure);

} // namespace kvf
