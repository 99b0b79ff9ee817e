#include "states/formats.h"

#include <algorithm>
#include <cstring>

#include "core/checksum.h"
#include "core/status.h"

namespace kvf {
namespace {

// All known formats. A new format becomes a new row when `make test-builds` has seen it in a real
// library. (docs/builds.md says what was seen on which build.)
constexpr StateFormat kFormats[] = {
    // name, framed, words a cell, words after the layers, seen in
    {"unframed", false, 0, 0, "b8390"},
    {"unframed-2d", false, 2, 0, "b8390: M-RoPE"},
    {"framed", true, 0, 0, "b9842 to v0.5.0"},
    {"framed-2d", true, 2, 0, "b9842 to b10361: M-RoPE"},
    {"framed-2d-token", true, 3, 0, "v0.4.0, v0.5.0: M-RoPE"},
    {"rotated", true, 0, 2, "0.6.0"},
    {"rotated-2d-token", true, 3, 2, "0.6.0: M-RoPE, n-gram models"},
};

constexpr uint32_t kMostStreams = 256; // LLAMA_MAX_SEQ
constexpr uint32_t kMostLayers = 4096; // far above any model
constexpr uint32_t kMostTypes = 256;   // far above GGML_TYPE_COUNT
constexpr size_t kMostSections = 8;

class Reader {
public:
    Reader(const StateView &state, uint64_t at)
        : data_(state.data), size_(state.bytes), at_(std::min(at, state.bytes)) {}

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

bool has_magic(const StateView &state) {
    uint32_t magic;
    return Reader(state, 0).read(magic) && magic == kStateMagic;
}

bool plausible(int32_t type) { return type >= 0 && static_cast<uint32_t>(type) < kMostTypes; }

// Reads a state by one format. Where the format leaves two possibilities, the parser tries one, and
// then returns and tries the other. The budget bounds these attempts: no state makes the parser
// read more than a few times the state's length.
class Walk {
public:
    Walk(const StateView &state, const StateFormat &format, const Structure *like)
        : state_(state), format_(format), like_(like), budget_(1024 + state.bytes / 2) {}

    std::optional<Structure> run() {
        structure_.format = &format_;
        structure_.framed = format_.framed;
        structure_.bytes = state_.bytes;
        const uint64_t frame = format_.framed ? kFrameBytes : 0;
        if (state_.bytes < frame || !read_sections(Reader(state_, frame))) return std::nullopt;
        if (structure_.cells() == 0) structure_.format = nullptr;
        for (const auto &section : structure_.sections) {
            for (const auto &tensor : section.tensors)
                structure_.tensor_bytes += section.cells * tensor.row;
        }
        return std::move(structure_);
    }

private:
    bool spend() {
        if (budget_ == 0) return false;
        --budget_;
        return true;
    }

    // Returns what is known of the section that comes next; NULL if nothing is known.
    const Section *known() const {
        const size_t index = structure_.sections.size();
        return like_ && index < like_->sections.size() ? &like_->sections[index] : nullptr;
    }

    bool read_sections(Reader reader) {
        const size_t index = structure_.sections.size();
        if (reader.left() == 0) return like_ ? index == like_->sections.size() : index > 0;
        if (index == (like_ ? like_->sections.size() : kMostSections)) return false;
        const Section *known = this->known();
        if (!known || known->kind == Section::Kind::Attention) {
            for (const bool has_values : {true, false}) {
                Reader here = reader;
                Section section;
                if (!read_attention(here, has_values, section)) continue;
                if (go_on(here, std::move(section))) return true;
            }
        }
        if (!known || known->kind == Section::Kind::Recurrent) return read_recurrent(reader);
        return false;
    }

    bool go_on(Reader reader, Section &&section) {
        structure_.sections.push_back(std::move(section));
        if (read_sections(reader)) return true;
        structure_.sections.pop_back();
        return false;
    }

    bool read_cells(Reader &reader, uint32_t count) {
        for (uint32_t i = 0; i < count; ++i) {
            int32_t position, sequence;
            uint32_t sequences;
            if (!spend() || !reader.read(position) || !reader.read(sequences)) return false;
            // A negative position would mark the cell as empty, and the cell could never be freed
            // again. After the largest positions there is no next position to decode.
            if (position < 0 || position > state_.last_position || sequences != 1) return false;
            if (!reader.skip(format_.cell_words, sizeof(uint32_t)) || !reader.read(sequence))
                return false;
        }
        return true;
    }

    bool read_tensor(Reader &reader, uint64_t cells, bool transposed, Section &section) {
        TensorShape shape{};
        if (!spend() || !reader.read(shape.type) || !plausible(shape.type)) return false;
        if (transposed) {
            uint32_t rows;
            if (!reader.read(shape.element) || !reader.read(rows)) return false;
            shape.row = uint64_t{shape.element} * rows;
        } else if (!reader.read(shape.row)) {
            return false;
        }
        section.tensor_at.push_back(reader.at());
        section.tensors.push_back(shape);
        return reader.skip(cells, shape.row);
    }

    bool read_stream(Reader &reader, uint32_t cells, bool has_values, Section &section) {
        if (cells > reader.left() / cell_bytes(format_)) return false;
        section.cells = cells;
        section.cells_at = reader.at();
        uint32_t transposed;
        if (!read_cells(reader, cells)) return false;
        if (!reader.read(transposed) || transposed > 1) return false;
        if (!reader.read(section.layers) || section.layers > kMostLayers) return false;
        section.transposed = transposed;
        section.rotation.resize(format_.rotation_words);
        for (uint32_t &word : section.rotation) {
            if (!reader.read(word)) return false;
        }
        for (uint32_t layer = 0; layer < section.layers; ++layer) {
            if (!read_tensor(reader, cells, false, section)) return false;
        }
        for (uint32_t layer = 0; has_values && layer < section.layers; ++layer) {
            if (!read_tensor(reader, cells, section.transposed, section)) return false;
        }
        return true;
    }

    bool read_attention(Reader &reader, bool has_values, Section &section) {
        if (!reader.read(section.streams) || section.streams == 0) return false;
        if (section.streams > kMostStreams) return false;
        for (uint32_t stream = 0; stream < section.streams; ++stream) {
            uint32_t cells;
            if (!spend() || !reader.read(cells)) return false;
            if (cells == 0) continue;
            // A sequence lies in one stream. libllama would load a state with two streams twice
            // into the same cells.
            if (section.cells || !read_stream(reader, cells, has_values, section)) return false;
            section.stream = stream;
        }
        // Without cells, a section with values has the same bytes as one without.
        return section.cells > 0 || has_values;
    }

    // Reads the part of a recurrent section before its tensors.
    bool read_recurrent_cell(Reader &reader, Section &section) {
        section.kind = Section::Kind::Recurrent;
        uint32_t cells, transposed;
        if (!reader.read(cells) || cells > 1)
            return false; // one cell holds a sequence's whole state
        section.cells = cells;
        section.cells_at = reader.at();
        if (cells) {
            int32_t position;
            uint32_t sequences;
            if (!reader.read(position) || !reader.read(sequences)) return false;
            if (position < 0 || position > state_.last_position || sequences != 0) return false;
        }
        if (!reader.read(transposed) || transposed != 0) return false;
        return reader.read(section.layers) && section.layers <= kMostLayers;
    }

    // Only `like`, or the bytes behind the section, tell how many layers of a recurrent section
    // have tensors.
    bool read_recurrent(Reader reader) {
        Section section;
        if (!read_recurrent_cell(reader, section)) return false;
        const uint64_t most = 2 * uint64_t{section.layers};
        const Section *known = this->known();
        const uint64_t wanted = known ? known->tensors.size() : most;
        std::vector<Reader> ends{reader};
        while (reader.left() > 0 && section.tensors.size() < wanted) {
            if (!read_tensor(reader, section.cells, false, section)) break;
            ends.push_back(reader);
        }
        if (known) return ends.size() == wanted + 1 && go_on(ends.back(), std::move(section));
        const size_t index = structure_.sections.size();
        structure_.sections.push_back(std::move(section));
        // The possibility that leaves the fewest bytes is tried first.
        for (; !ends.empty() && spend(); ends.pop_back()) {
            structure_.sections[index].tensors.resize(ends.size() - 1);
            structure_.sections[index].tensor_at.resize(ends.size() - 1);
            if (read_sections(ends.back())) return true;
        }
        structure_.sections.pop_back();
        return false;
    }

    const StateView &state_;
    const StateFormat &format_;
    const Structure *const like_;
    uint64_t budget_; // cells, streams and tensors that may still be read
    Structure structure_;
};

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

bool Structure::has_one_attention_first() const {
    const auto is_attention = [](const Section &section) {
        return section.kind == Section::Kind::Attention;
    };
    return !sections.empty() && is_attention(sections[0]) &&
           std::count_if(sections.begin(), sections.end(), is_attention) == 1;
}

std::string Structure::kind() const {
    std::string kind;
    for (const auto &section : sections) {
        kind += kind.empty() ? "" : "+";
        kind += section.kind == Section::Kind::Attention ? "attention" : "recurrent";
    }
    return kind;
}

std::vector<Structure> parse_state_in_every_way(const StateView &state, const Structure *like) {
    std::vector<Structure> found;
    const bool framed = has_magic(state);
    if (like && like->framed != framed) return found;
    for (const StateFormat &format : kFormats) {
        if (format.framed != framed) continue;
        if (like && like->format && like->format != &format) continue;
        auto structure = Walk(state, format, like).run();
        if (!structure) continue;
        // Without cells, all formats have the same bytes.
        const bool settled = !structure->format;
        found.push_back(std::move(*structure));
        if (settled) break;
    }
    return found;
}

std::optional<Structure> parse_state(const StateView &state, const Structure *like) {
    auto found = parse_state_in_every_way(state, like);
    if (found.empty()) return std::nullopt;
    return std::move(found.front());
}

bool is_frame_alone(const StateView &state) {
    return state.bytes == kFrameBytes && has_magic(state);
}

namespace {

// Compares two sections of one kind, as mismatch() of structures.
std::string mismatch(const Section &state, const Section &cache) {
    const bool is_recurrent = state.kind == Section::Kind::Recurrent;
    if (!is_recurrent && state.streams != cache.streams)
        return format("%u cache streams instead of %u", state.streams, cache.streams);
    // A section without cells does not tell how many layers it has.
    if (!is_recurrent && (!state.cells || !cache.cells)) return "";
    if (state.layers != cache.layers)
        return format("%u layers instead of %u", state.layers, cache.layers);
    if (state.transposed != cache.transposed) {
        return state.transposed ? "V is transposed (saved without flash attention)"
                                : "V is not transposed (saved with flash attention)";
    }
    if (state.tensors != cache.tensors) return "the cache's types or row sizes differ";
    if (state.rotation != cache.rotation) return "its keys or values are rotated differently";
    return "";
}

} // namespace

std::string mismatch(const Structure &state, const Structure &cache) {
    if (state.kind() != cache.kind()) {
        return "a state of kind " + state.kind() + " for a cache of kind " + cache.kind();
    }
    // libllama reads all cells by its own format, so a state of another format is refused.
    if (state.framed != cache.framed ||
        (state.format && cache.format && state.format != cache.format)) {
        return "another release of llama.cpp, or another kind of model, wrote it";
    }
    for (size_t i = 0; i < state.sections.size(); ++i) {
        if (std::string why = mismatch(state.sections[i], cache.sections[i]); !why.empty())
            return why;
    }
    return "";
}

std::string layout_hash(const Structure &structure) {
    std::string text = structure.format ? structure.format->name : "";
    text += structure.framed ? " framed" : " bare";
    for (const Section &section : structure.sections) {
        const bool attention = section.kind == Section::Kind::Attention;
        text += format("; %s streams %u layers %u %s", attention ? "attention" : "recurrent",
                       attention ? section.streams : 1, section.layers,
                       section.transposed ? "transposed" : "straight");
        for (const uint32_t word : section.rotation) text += format(" rotated %u", word);
        for (const TensorShape &tensor : section.tensors)
            text += format(" (%d %llu %u)", tensor.type,
                           static_cast<unsigned long long>(tensor.row), tensor.element);
    }
    return format("%016llx", static_cast<unsigned long long>(checksum(text.data(), text.size())));
}

} // namespace kvf
