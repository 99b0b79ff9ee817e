#include "states/writer.h"

namespace kvf {

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
