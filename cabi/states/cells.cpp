#include "states/cells.h"

#include <algorithm>
#include <cstring>

namespace kvf {
namespace {

int32_t position_of(const Section &section, const StateFormat &format, const StateView &state,
                    uint64_t cell) {
    int32_t position;
    std::memcpy(&position, state.data + section.cells_at + cell * cell_bytes(format),
                sizeof position);
    return position;
}

std::vector<int32_t> positions_of(const Section &section, const StateFormat &format,
                                  const StateView &state) {
    std::vector<int32_t> positions(section.cells);
    for (uint64_t cell = 0; cell < section.cells; ++cell)
        positions[cell] = position_of(section, format, state, cell);
    return positions;
}

// A window of any kind: says of a cell at `position` what is_masked_swa() would say for one kind of
// window at least.
struct Window {
    int64_t size;

    bool is_outside(int64_t position, int64_t from) const { return from - position >= size; }
    // Whether the token behind `last` may not see the cell, while the token at `last` still sees
    // it.
    bool may_leave_after(int64_t position, int64_t last) const {
        const bool sliding = is_outside(position, last + 1);
        const bool symmetric = last + 1 - position > size / 2 && last - position <= size / 2;
        const bool chunked = (last + 1) % size == 0;
        return sliding || symmetric || chunked;
    }
    // Whether the token behind `last` may not see the cell. The token at `last` may see it or not.
    bool may_be_outside_after(int64_t position, int64_t last) const {
        const bool sliding = is_outside(position, last + 1);
        const bool symmetric = last + 1 - position > size / 2;
        const bool chunked = position < (last + 1) / size * size;
        return sliding || symmetric || chunked;
    }
};

// Returns the section that holds a window's cells. A cache of two kinds of layers has two attention
// sections, and the last one is the window's. Returns NULL if there are not two.
const Section *section_of_window(const Structure &structure) {
    const Section *last = nullptr;
    size_t count = 0;
    for (const Section &section : structure.sections) {
        if (section.kind != Section::Kind::Attention) continue;
        last = &section;
        ++count;
    }
    return count > 1 ? last : nullptr;
}

// Runs of the cells that libllama may give away when the token behind `last` is decoded.
// `has_masked`: some cells may be outside of the window already.
std::vector<ByteRange> cells_that_may_go(const std::vector<int32_t> &positions,
                                         const Window &window, int64_t last, bool has_masked) {
    std::vector<ByteRange> cells;
    for (uint64_t cell = 0; cell < positions.size(); ++cell) {
        const bool may_go = has_masked ? window.may_be_outside_after(positions[cell], last)
                                       : window.may_leave_after(positions[cell], last);
        if (!may_go) continue;
        if (!cells.empty() && cells.back().end == cell) {
            ++cells.back().end;
        } else {
            cells.push_back({cell, cell + 1});
        }
    }
    return cells;
}

// Adds the bytes of the cells in each tensor of the section, in the order of the state.
void add_cells(const Section &section, const std::vector<ByteRange> &cells,
               std::vector<ByteRange> &ranges) {
    for (size_t i = 0; i < section.tensors.size(); ++i) {
        const TensorShape &shape = section.tensors[i];
        const uint64_t unit = shape.element ? shape.element : shape.row; // bytes of a cell in a row
        const uint64_t rows = shape.element ? shape.row / shape.element : 1;
        for (uint64_t row = 0; row < rows; ++row) {
            const uint64_t at = section.tensor_at[i] + row * section.cells * unit;
            for (const ByteRange &run : cells)
                ranges.push_back({at + run.begin * unit, at + run.end * unit});
        }
    }
}

} // namespace

int32_t position_of_cell(const Structure &structure, size_t index, const StateView &state,
                         uint64_t cell) {
    const Section &section = structure.sections[index];
    // A recurrent section has one cell.
    if (section.kind == Section::Kind::Recurrent) cell = 0;
    return position_of(section, *structure.format, state, cell);
}

void copy_metadata(const Structure &structure, const StateView &state, unsigned char *memory,
                   uint64_t from, uint64_t to) {
    uint64_t at = from; // the bytes before it have been copied, or are tensor bytes
    for (const Section &section : structure.sections) {
        for (size_t i = 0; i < section.tensors.size(); ++i) {
            const uint64_t begin = section.tensor_at[i];
            std::memcpy(memory + to + (at - from), state.data + at, begin - at);
            at = begin + section.cells * section.tensors[i].row;
        }
    }
    std::memcpy(memory + to + (at - from), state.data + at, state.bytes - at);
}

bool positions_agree(const Structure &structure, const StateView &state) {
    const auto positions_in_order = [&](const Section &section) {
        std::vector<int32_t> positions = positions_of(section, *structure.format, state);
        std::sort(positions.begin(), positions.end());
        return positions;
    };
    const Section *first = nullptr;
    std::vector<int32_t> all;
    for (const Section &section : structure.sections) {
        if (section.kind != Section::Kind::Attention) continue;
        if (!first) {
            first = &section;
            continue;
        }
        if (section.cells == 0) continue;
        if (all.empty()) all = positions_in_order(*first);
        const auto these = positions_in_order(section);
        if (!std::includes(all.begin(), all.end(), these.begin(), these.end())) return false;
    }
    return true;
}

std::vector<ByteRange> bytes_free_for_others(const Structure &structure, const StateView &state,
                                             int32_t window_size) {
    std::vector<ByteRange> ranges;
    if (window_size <= 0 || !structure.format) return ranges;
    const Window window{window_size};
    const Section *const of_window = section_of_window(structure);
    for (const Section &section : structure.sections) {
        if (section.kind != Section::Kind::Attention || section.cells == 0) continue;
        // If there are several streams, each sequence has a stream of its own.
        if (section.streams > 1) continue;
        const auto positions = positions_of(section, *structure.format, state);
        const auto [first, last] = std::minmax_element(positions.begin(), positions.end());
        const bool has_outside = window.is_outside(*first, *last);
        // A section with cells outside of any window keeps every token.
        if (has_outside && &section != of_window) continue;
        const bool has_masked = has_outside || !structure.framed;
        add_cells(section, cells_that_may_go(positions, window, *last, has_masked), ranges);
    }
    return ranges;
}

} // namespace kvf
