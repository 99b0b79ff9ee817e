#include "states/writer.h"

namespace kvf {
namespace {

// Writes a recurrent section of one cell at position 0, with room for its tensor bytes.
void write_recurrent_cell(StateWriter &out, const Section &section) {
    out.add<uint32_t>(1); // cells
    out.add<int32_t>(0);  // position
    out.add<uint32_t>(0); // number of sequences
    out.add<uint32_t>(0); // not transposed
    out.add(section.layers);
    for (const TensorShape &shape : section.tensors) {
        write_tensor_entry(out, shape);
        out.skip(shape.row);
    }
}

// Writes the same for an attention section. The first stream has the cell.
void write_attention_cell(StateWriter &out, const Section &section, const StateFormat &format) {
    Section in_first = section;
    in_first.stream = 0;
    write_attention(out, in_first, 1, [&](StateWriter &cell, uint64_t) {
        cell.add<int32_t>(0);  // position
        cell.add<uint32_t>(1); // number of sequences
        cell.skip(format.cell_words * sizeof(uint32_t));
        cell.add<int32_t>(0); // sequence
    });
}

} // namespace

std::vector<unsigned char> make_state_of_one_cell(const Structure &structure) {
    const auto write = [&](StateWriter out) {
        write_frame(out, structure, 0);
        for (const Section &section : structure.sections) {
            if (section.kind == Section::Kind::Attention) {
                write_attention_cell(out, section, *structure.format);
            } else {
                write_recurrent_cell(out, section);
            }
        }
        return out.at();
    };
    std::vector<unsigned char> state(write(StateWriter(nullptr)));
    write(StateWriter(state.data()));
    return state;
}

void write_frame(StateWriter &out, const Structure &structure, int32_t sequence) {
    if (!structure.framed) return;
    out.add(kStateMagic);
    out.add(sequence);
}

void write_tensor_entry(StateWriter &out, const TensorShape &shape) {
    out.add(shape.type);
    if (shape.element) {
        out.add(shape.element);
        out.add(static_cast<uint32_t>(shape.row / shape.element));
    } else {
        out.add(shape.row);
    }
}

void write_before_cells(StateWriter &out, const Section &section) {
    out.add(section.streams);
    for (uint32_t i = 0; i < section.stream; ++i) out.add<uint32_t>(0);
    out.add(static_cast<uint32_t>(section.cells));
}

void write_behind_cells(StateWriter &out, Section &section) {
    out.add(uint32_t{section.transposed});
    out.add(section.layers);
    for (const uint32_t word : section.rotation) out.add(word);
    section.tensor_at.clear();
    for (const TensorShape &shape : section.tensors) {
        write_tensor_entry(out, shape);
        section.tensor_at.push_back(out.at());
        out.skip(section.cells * shape.row);
    }
    for (uint32_t i = section.stream + 1; i < section.streams; ++i) out.add<uint32_t>(0);
}

} // namespace kvf
