#include "structure.h"

#include <algorithm>
#include <cstring>

#include "status.h"

namespace kvf {
namespace {

constexpr uint32_t kMagic = 0xaf143cd8; // io_magic in llama-context.cpp
constexpr uint32_t kMostStreams = 256;  // LLAMA_MAX_SEQ
constexpr uint32_t kMostLayers = 4096;  // far above any model
constexpr uint32_t kMostTypes = 256;    // far above GGML_TYPE_COUNT
constexpr size_t kMostSections = 8;

class Reader {
public:
    Reader(const unsigned char *data, uint64_t size, uint64_t at)
        : data_(data), size_(size), at_(at) {}

    template <class T>
    bool read(T &value) {
        if (size_ - at_ < sizeof value) return false;
        std::memcpy(&value, data_ + at_, sizeof value);
        at_ += sizeof value;
        return true;
    }
    bool skip(uint64_t bytes) {
        if (size_ - at_ < bytes) return false;
        at_ += bytes;
        return true;
    }
    // Skips count * bytes.
    bool skip(uint64_t count, uint64_t bytes) {
        uint64_t product;
        return !__builtin_mul_overflow(count, bytes, &product) && skip(product);
    }
    uint64_t at() const { return at_; }
    uint64_t left() const { return size_ - at_; }

private:
    const unsigned char *data_;
    uint64_t size_, at_;
};

// What the format does not say of itself and must be tried out.
struct AttentionVariant {
    bool has_extension; // M-RoPE models: two more coordinates a cell
    bool has_values;    // MLA models: K alone
};
constexpr AttentionVariant kAttentionVariants[] = {
    {false, true}, {false, false}, {true, true}, {true, false}};

bool plausible(int32_t type) { return type >= 0 && static_cast<uint32_t>(type) < kMostTypes; }

bool read_cells(Reader &reader, uint32_t count, AttentionVariant variant) {
    for (uint32_t i = 0; i < count; ++i) {
        int32_t position, sequence;
        uint32_t sequences;
        if (!reader.read(position) || !reader.read(sequences)) return false;
        // A negative position would mark the cell as empty and never be freed again; the largest one
        // leaves no next position to decode.
        if (position < 0 || position == INT32_MAX || sequences != 1) return false;
        if (variant.has_extension && !reader.skip(2 * sizeof(int32_t))) return false;
        if (!reader.read(sequence)) return false;
    }
    return true;
}

bool read_tensors(Reader &reader, uint32_t layers, uint64_t cells, Section &section) {
    for (uint32_t i = 0; i < layers; ++i) {
        int32_t type;
        uint64_t row;
        if (!reader.read(type) || !reader.read(row) || !plausible(type)) return false;
        if (!reader.skip(cells, row)) return false;
        section.tensors.push_back({type, row});
    }
    return true;
}

bool read_transposed(Reader &reader, uint32_t layers, uint64_t cells, Section &section) {
    for (uint32_t i = 0; i < layers; ++i) {
        int32_t type;
        uint32_t element, rows;
        if (!reader.read(type) || !reader.read(element) || !reader.read(rows)) return false;
        if (!plausible(type)) return false;
        if (!reader.skip(cells * element, rows)) return false;
        section.tensors.push_back({type, uint64_t{element} * rows});
    }
    return true;
}

bool read_attention(Reader &reader, AttentionVariant variant, Section &section) {
    section = {};
    section.extended = variant.has_extension;
    if (!reader.read(section.streams) || section.streams == 0 || section.streams > kMostStreams) {
        return false;
    }
    bool seen = false;
    for (uint32_t stream = 0; stream < section.streams; ++stream) {
        uint32_t cells;
        if (!reader.read(cells)) return false;
        if (cells == 0) continue;
        // A sequence lies in one stream; a state with two would be loaded twice into the same cells.
        if (seen || cells > reader.left() / (3 * sizeof(uint32_t))) return false;
        seen = true;
        section.cells = cells;
        uint32_t transposed;
        if (!read_cells(reader, cells, variant)) return false;
        if (!reader.read(transposed) || transposed > 1) return false;
        if (!reader.read(section.layers) || section.layers > kMostLayers) {
            return false;
        }
        section.transposed = transposed;
        if (!read_tensors(reader, section.layers, cells, section)) return false;
        if (!variant.has_values) continue;
        if (transposed ? !read_transposed(reader, section.layers, cells, section)
                       : !read_tensors(reader, section.layers, cells, section)) {
            return false;
        }
    }
    return true;
}

// A recurrent section is the last one. How many of its layers have tensors only its length tells.
bool read_recurrent(Reader &reader, Section &section) {
    section = {};
    section.kind = Section::Kind::Recurrent;
    uint32_t cells, transposed;
    if (!reader.read(cells) || cells > 1) return false; // one cell holds a sequence's whole state
    section.cells = cells;
    if (cells) {
        int32_t position;
        uint32_t sequences;
        if (!reader.read(position) || !reader.read(sequences)) return false;
        if (position < 0 || position == INT32_MAX || sequences != 0) return false;
    }
    if (!reader.read(transposed) || transposed != 0) return false;
    if (!reader.read(section.layers) || section.layers > kMostLayers) return false;
    while (reader.left() > 0) {
        if (section.tensors.size() == 2 * uint64_t{section.layers}) return false;
        if (!read_tensors(reader, 1, cells, section)) return false;
    }
    return true;
}

// Tries the formats in turn, and goes back where one does not lead to the end.
bool read_sections(Reader reader, Structure &structure) {
    if (reader.left() == 0) return !structure.sections.empty();
    if (structure.sections.size() == kMostSections) return false;
    Section section;
    uint64_t first_end = 0;
    for (const auto variant : kAttentionVariants) {
        Reader here = reader;
        if (!read_attention(here, variant, section)) continue;
        // A section without cells reads the same in every variant.
        if (section.cells == 0 && here.at() == first_end) continue;
        first_end = here.at();
        structure.sections.push_back(section);
        if (read_sections(here, structure)) return true;
        structure.sections.pop_back();
    }
    Reader here = reader;
    if (!read_recurrent(here, section)) return false;
    structure.sections.push_back(section);
    return true;
}

} // namespace

uint64_t Structure::cells() const {
    uint64_t most = 0;
    for (const auto &section : sections) most = std::max(most, section.cells);
    return most;
}

bool Structure::has_cells_everywhere() const {
    return std::all_of(sections.begin(), sections.end(),
                       [](const Section &section) { return section.cells > 0; });
}

std::string Structure::kind() const {
    std::string kind;
    for (const auto &section : sections) {
        kind += kind.empty() ? "" : "+";
        kind += section.kind == Section::Kind::Attention ? "attention" : "recurrent";
    }
    return kind;
}

bool has_state_magic(const unsigned char *state, uint64_t bytes) {
    uint32_t magic;
    Reader reader(state, bytes, 0);
    return reader.read(magic) && magic == kMagic;
}

std::optional<Structure> parse_state(const unsigned char *state, uint64_t bytes) {
    if (!has_state_magic(state, bytes) || bytes < 2 * sizeof(uint32_t)) return std::nullopt;
    Structure structure;
    if (!read_sections(Reader(state, bytes, 2 * sizeof(uint32_t)), structure)) return std::nullopt;
    for (const auto &section : structure.sections) {
        for (const auto &tensor : section.tensors)
            structure.tensor_bytes += section.cells * tensor.row;
    }
    return structure;
}

std::string mismatch(const Structure &state, const Structure &cache) {
    if (state.kind() != cache.kind()) {
        return "a state of kind " + state.kind() + " for a cache of kind " + cache.kind();
    }
    for (size_t i = 0; i < state.sections.size(); ++i) {
        const Section &a = state.sections[i];
        const Section &b = cache.sections[i];
        if (a.kind == Section::Kind::Attention && a.streams != b.streams) {
            return format("%u cache streams instead of %u", a.streams, b.streams);
        }
        if (a.layers && b.layers && a.layers != b.layers) {
            return format("%u layers instead of %u", a.layers, b.layers);
        }
        const bool both_say = a.kind == Section::Kind::Recurrent || (a.cells && b.cells);
        if (!both_say) continue;
        if (a.transposed != b.transposed) {
            return a.transposed ? "V is transposed (saved without flash attention)"
                                : "V is not transposed (saved with flash attention)";
        }
        if (a.tensors != b.tensors) return "the cache's types or row sizes differ";
        // libllama reads cells as the cache has them, whatever they were taken for here.
        if (a.extended != b.extended) return "its cells have other coordinates";
    }
    return "";
}

} // namespace kvf
