// Writes states as llama.cpp does (state_write in llama-kv-cache.cpp and llama-memory-recurrent.cpp
// of b8390 to 0.6.0). The tensor bytes of a cell follow from its position and the tensor, so that
// the state of some of the cells is written by naming their positions.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

class StateBuilder {
public:
    // What differs between releases and models.
    struct Format {
        bool framed = true;
        uint32_t cell_words = 0;
        uint32_t rotation_words = 0;
    };

    StateBuilder() : StateBuilder(Format{}) {}
    explicit StateBuilder(const Format &format) : format(format) {
        if (!format.framed) return;
        add<uint32_t>(0xaf143cd8); // the sequence format's magic number
        add<int32_t>(0);           // sequence
    }

    template <class T>
    StateBuilder &add(T value) {
        const size_t at = bytes.size();
        bytes.resize(at + sizeof value);
        std::memcpy(bytes.data() + at, &value, sizeof value);
        return *this;
    }

    struct Attention {
        uint32_t streams = 1;
        uint32_t stream = 0; // that holds the cells
        uint32_t cells = 3;
        uint32_t layers = 2;
        int32_t type = 1; // GGML_TYPE_F16
        uint32_t row = 32;
        bool transposed = false;
        bool values = true;    // not with MLA
        int32_t position = 0;  // of the first cell
        uint32_t rotation = 0; // each of its words
        // Of all cells, instead of `cells` and `position`.
        std::vector<int32_t> positions = {};
    };

    StateBuilder &attention(const Attention &a) {
        add(a.streams);
        std::vector<int32_t> positions = a.positions;
        if (positions.empty()) {
            for (uint32_t i = 0; i < a.cells; ++i)
                positions.push_back(a.position + static_cast<int32_t>(i));
        }
        for (uint32_t stream = 0; stream < a.streams; ++stream) {
            if (stream != a.stream || positions.empty()) {
                add<uint32_t>(0);
                continue;
            }
            add(static_cast<uint32_t>(positions.size()));
            for (const int32_t position : positions) {
                add(position).add<uint32_t>(1);
                for (uint32_t word = 0; word < format.cell_words; ++word) add<int32_t>(7);
                add<int32_t>(0); // the sequence
            }
            add<uint32_t>(a.transposed).add(a.layers);
            for (uint32_t word = 0; word < format.rotation_words; ++word) add(a.rotation);
            for (uint32_t layer = 0; layer < a.layers; ++layer) {
                add(a.type).add<uint64_t>(a.row);
                rows(positions, layer, 0, a.row);
            }
            for (uint32_t layer = 0; a.values && layer < a.layers; ++layer) {
                const uint32_t tensor = a.layers + layer;
                add(a.type);
                if (!a.transposed) {
                    add<uint64_t>(a.row);
                    rows(positions, tensor, 0, a.row);
                    continue;
                }
                constexpr uint32_t element = 2;
                add(element).add(a.row / element);
                for (uint32_t at = 0; at < a.row / element; ++at)
                    rows(positions, tensor, at, element);
            }
        }
        return *this;
    }

    struct Recurrent {
        uint32_t cells = 1;
        uint32_t layers = 2;
        uint32_t layers_with_r = 2, layers_with_s = 2;
        uint64_t r = 48, s = 64; // row sizes
        int32_t position = 7;
    };

    StateBuilder &recurrent(const Recurrent &r) {
        add(r.cells);
        for (uint32_t i = 0; i < r.cells; ++i) add(r.position).add<uint32_t>(0);
        add<uint32_t>(0).add(r.layers);
        for (uint32_t i = 0; i < r.layers_with_r; ++i)
            add<int32_t>(0).add(r.r).tensor(r.cells * r.r);
        for (uint32_t i = 0; i < r.layers_with_s; ++i)
            add<int32_t>(0).add(r.s).tensor(r.cells * r.s);
        return *this;
    }

    std::vector<unsigned char> bytes;
    Format format;

private:
    // `width` bytes of each cell.
    void rows(const std::vector<int32_t> &positions, uint32_t tensor, uint32_t row,
              uint32_t width) {
        for (const int32_t position : positions) {
            for (uint32_t i = 0; i < width; ++i) {
                const uint32_t mixed = 2654435761U * (static_cast<uint32_t>(position) + 1) +
                                       40503U * (tensor + 1) + 977U * row + 31U * i;
                bytes.push_back(static_cast<unsigned char>(mixed >> 8));
            }
        }
        tensor_bytes += positions.size() * width;
    }
    StateBuilder &tensor(uint64_t count) {
        bytes.resize(bytes.size() + count, 0x5a);
        tensor_bytes += count;
        return *this;
    }

public:
    uint64_t tensor_bytes = 0;
};
