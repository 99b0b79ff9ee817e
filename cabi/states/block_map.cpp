#include "states/block_map.h"

namespace kvf {

void BlockMap::add_section(const Section &whole, const std::vector<const Section *> &blocks,
                           std::vector<CellRun> runs) {
    InBlocks section;
    section.runs = std::move(runs);
    for (const Section *block : blocks) {
        section.cells.push_back(block ? block->cells : 0);
        section.tensor_at.push_back(block ? block->tensor_at : std::vector<uint64_t>());
    }
    for (size_t i = 0; i < whole.tensors.size(); ++i) {
        const TensorShape &shape = whole.tensors[i];
        const uint64_t unit = shape.element ? shape.element : shape.row;
        const uint64_t bytes = whole.cells * shape.row;
        if (bytes == 0) continue;
        tensors_.push_back({whole.tensor_at[i], whole.tensor_at[i] + bytes, unit,
                            whole.cells * unit, sections_.size(), i});
    }
    sections_.push_back(std::move(section));
}

void BlockMap::add_rest(uint64_t begin, uint64_t end, size_t block, uint64_t offset) {
    if (begin == end) return;
    // As one cell of one tensor.
    InBlocks rest;
    rest.runs.push_back({0, 1, block, 0});
    rest.cells.assign(block + 1, 1);
    rest.tensor_at.resize(block + 1);
    rest.tensor_at[block].push_back(offset);
    tensors_.push_back({begin, end, end - begin, end - begin, sections_.size(), 0});
    sections_.push_back(std::move(rest));
}

const BlockMap::Tensor *BlockMap::tensor_at(uint64_t place) {
    const auto holds = [&](size_t i) {
        return i < tensors_.size() && tensors_[i].begin <= place && place < tensors_[i].end;
    };
    if (!holds(last_)) {
        const auto found = std::partition_point(
            tensors_.begin(), tensors_.end(), [&](const Tensor &one) { return one.end <= place; });
        last_ = static_cast<size_t>(found - tensors_.begin());
        if (!holds(last_)) return nullptr;
    }
    return &tensors_[last_];
}

} // namespace kvf
