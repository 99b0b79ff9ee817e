// The formats of a state: what llama.cpp writes around the tensor bytes.
//
// libllama trusts the states that it loads: some damaged ones end the process in an assertion,
// others leave cells that can never be freed. So a state is walked through here before libllama
// sees it.
//
// llama.cpp does not document its formats, and they differ between releases and models. Each one
// that is known here is a row of one table (formats.cpp), with the builds in which it was seen. The
// functions that write them are the state_write() of llama.cpp's llama-kv-cache.cpp and
// llama-memory-recurrent.cpp. A state is a frame, and one section for each part of the memory. What
// no row accounts for, to the last byte, is opaque: it is not called damaged, since another format
// may be the reason (envelope.h guards it).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace kvf {

// What differs between releases and models, and is the same in all sections of a state.
struct StateFormat {
    const char *name;
    bool framed;             // begins with a magic number and the id of the sequence
    uint32_t cell_words;     // further words of 32 bits a cell: coordinates of M-RoPE, the token
    uint32_t rotation_words; // words of 32 bits after the number of layers: how keys and values are
                             // rotated
    const char *seen;        // builds, and models where not in all
};

// One tensor's entry: its ggml type and the bytes of one row; where V is transposed, of one cell.
struct TensorShape {
    int32_t type;
    uint64_t row;
    uint32_t element; // bytes of one element where V is transposed, else 0
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
    const StateFormat *format = nullptr; // NULL where there are no cells: several are possible
    bool framed = true;
    std::vector<Section> sections;
    uint64_t tensor_bytes = 0;
    uint64_t bytes = 0; // of the state

    uint64_t cells() const;
    bool has_cells_everywhere() const;
    // One section of attention, and that the first.
    bool has_one_attention_first() const;
    // "attention", "attention+recurrent" ...
    std::string kind() const;
};

// A state to walk through, and what is known about it beforehand.
struct StateView {
    const unsigned char *data;
    uint64_t bytes;
    int32_t last_position = INT32_MAX - 1; // positions beyond it are damaged
};

// The bytes of a cell of an attention section: position, number of sequences, further words,
// sequence.
constexpr uint64_t cell_bytes(const StateFormat &format) {
    return (3 + uint64_t{format.cell_words}) * sizeof(uint32_t);
}

constexpr uint32_t kStateMagic = 0xaf143cd8; // io_magic in llama-context.cpp
// The frame: the magic number, and the sequence.
constexpr uint64_t kFrameBytes = 2 * sizeof(uint32_t);

// Walks through a state. Nothing where no known format accounts for every byte of it. Where several
// do, the first. `like` (may be NULL) is what other states of this cache look like: sections that
// it knows must be as it says. Takes time in proportion to the state's metadata, and memory in
// proportion to the entries that are really there.
std::optional<Structure> parse_state(const StateView &state, const Structure *like = nullptr);
// All formats that account for the state.
std::vector<Structure> parse_state_in_every_way(const StateView &state,
                                                const Structure *like = nullptr);

// Whether the state is a frame around nothing. libllama writes that where the context's memory is
// that of another context (llama_context_params.ctx_other, from 0.6.0 on).
bool is_frame_alone(const StateView &state);

// Why a state with structure `state` cannot belong to a cache whose states look like `cache`; "" if
// it can. Sections without cells say less, and are compared by what they say.
std::string mismatch(const Structure &state, const Structure &cache);

} // namespace kvf
