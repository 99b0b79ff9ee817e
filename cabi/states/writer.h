// Writes the metadata of a state, which is all but its tensor bytes. formats.h reads it.
#pragma once

#include <cstring>

#include "states/formats.h"

namespace kvf {

// Appends to memory. Without memory it only counts the bytes.
class StateWriter {
public:
    explicit StateWriter(unsigned char *memory) : memory_(memory) {}

    template <class T>
    void add(T value) {
        copy(&value, sizeof value);
    }
    void copy(const void *bytes, uint64_t count) {
        if (memory_ && count) std::memcpy(memory_ + at_, bytes, count);
        at_ += count;
    }
    // Leaves room for tensor bytes, which somebody else writes.
    void skip(uint64_t count) { at_ += count; }
    uint64_t at() const { return at_; }

private:
    unsigned char *const memory_;
    uint64_t at_ = 0;
};

void write_frame(StateWriter &out, const Structure &structure, int32_t sequence);

// Writes an attention section with the tensors of `shape` and with `cells` cells. `write_cell(out,
// i)` writes the metadata of cell i, of cell_bytes(). Returns the section that was written.
template <class WriteCell>
Section write_attention(StateWriter &out, const Section &shape, uint64_t cells,
                        WriteCell &&write_cell);

// Returns a state of the same kind of cache with one cell, at position 0, whose tensor bytes are 0.
std::vector<unsigned char> make_state_of_one_cell(const Structure &structure);

// ---- Implementation ----------------------------------------------------------------------------

// Writes the entry of a tensor before its bytes: the type, the row size, and what else the format
// has there.
void write_tensor_entry(StateWriter &out, const TensorShape &shape);
void write_before_cells(StateWriter &out, const Section &section);
void write_behind_cells(StateWriter &out, Section &section);

template <class WriteCell>
Section write_attention(StateWriter &out, const Section &shape, uint64_t cells,
                        WriteCell &&write_cell) {
    Section section = shape;
    section.cells = cells;
    write_before_cells(out, section);
    section.cells_at = out.at();
    for (uint64_t i = 0; i < cells; ++i) write_cell(out, i);
    write_behind_cells(out, section);
    return section;
}

} // namespace kvf
