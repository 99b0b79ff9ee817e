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
    // The map sees these bytes as one cell of one tensor.
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

// Whether each row has the same cells as the others, and lies in a stripe of its own.
bool BlockMap::is_row_of_each_stripe(const Tensor &tensor, const Rows &rows) {
    const uint64_t end = rows.place + (rows.rows - 1) * rows.pitch + rows.width;
    const uint64_t column = (rows.place - tensor.begin) % tensor.stripe;
    return rows.pitch == tensor.stripe && column + rows.width <= tensor.stripe && end <= tensor.end;
}

bool BlockMap::are_alike(uint64_t a, uint64_t b, uint64_t bytes) {
    const Tensor *const one = tensor_at(a);
    const Tensor *const other = tensor_at(b);
    if (!one || !other) return false;
    return one->section == other->section && one->unit == other->unit &&
           one->stripe == other->stripe && a - one->begin == b - other->begin &&
           a + bytes <= one->end && b + bytes <= other->end;
}

uint64_t BlockMap::distance(size_t block, uint64_t a, uint64_t b) {
    const Tensor *const one = tensor_at(a);
    const Tensor *const other = tensor_at(b);
    if (one == other) return b - a;
    const std::vector<uint64_t> &at = sections_[one->section].tensor_at[block];
    return at[other->index] - at[one->index];
}

} // namespace kvf
