// Where the tensor bytes of a whole state lie in blocks, and the rest of it in a checkpoint.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "states/formats.h"

namespace kvf {

// Cells that follow one another in a section of a whole state, and in the same section of a block.
struct CellRun {
    uint64_t first; // in the whole state
    uint64_t count;
    size_t block;
    uint64_t first_in_block;
};

class BlockMap {
public:
    // Adds a section of the whole state, with the same section of each block and the runs of cells
    // in the order of the whole state. Cells in no run are in no block. Sections are added in the
    // order of the whole state.
    void add_section(const Section &whole, const std::vector<const Section *> &blocks,
                     std::vector<CellRun> runs);
    // Adds the bytes [begin, end) of the whole state. They lie in one more buffer, from `offset`
    // on; this buffer counts as the block behind the last one. Call this after all sections have
    // been added.
    void add_rest(uint64_t begin, uint64_t end, size_t block, uint64_t offset);

    // Calls `take(block, offset in the block, place in the whole state, bytes)` for each run of the
    // tensor bytes [place, place + bytes) of the whole state, in their order. Leaves out bytes that
    // no block has. Calls for ascending places are the fastest.
    template <class Take>
    void for_each(uint64_t place, uint64_t bytes, Take &&take);

    // While `take` runs: the index of the tensor, in the whole state, whose bytes it is given.
    size_t tensor() const { return last_; }

    // Rows of tensor bytes of the whole state.
    struct Rows {
        uint64_t place; // of the first row
        uint64_t width, rows;
        uint64_t pitch; // from one row to the next
    };
    // Calls `take(block, offset in the block, rows of the whole state, pitch in the block)` for the
    // runs that for_each() finds in all rows. Rows that one block holds at one pitch are given in
    // one call.
    template <class Take>
    void for_each_rows(const Rows &rows, Take &&take);

    // Whether the bytes at `a` and at `b` of the whole state belong to the same cells, in two
    // tensors of one shape (or in one tensor, if `a` is `b`). Both tensors must have all of these
    // bytes.
    bool are_alike(uint64_t a, uint64_t b, uint64_t bytes);
    // For bytes at `a` and `b` that are alike, and a block that holds both: the distance from the
    // first to the second in the block, modulo 2^64.
    uint64_t distance(size_t block, uint64_t a, uint64_t b);

    // Calls `take`, as for_each() does, for all tensor bytes.
    template <class Take>
    void for_all(Take &&take) {
        for (const Tensor &tensor : tensors_)
            for_each(tensor.begin, tensor.end - tensor.begin, take);
    }

private:
    struct Tensor {
        uint64_t begin, end; // in the whole state
        uint64_t unit;       // bytes of one cell in a stripe: a row, or one element
        uint64_t stripe;     // bytes of all cells of the whole state, `unit` each
        size_t section;      // index into sections_
        size_t index;        // of the tensor in its section
    };
    struct InBlocks {
        std::vector<CellRun> runs;
        std::vector<uint64_t> cells;                  // by block
        std::vector<std::vector<uint64_t>> tensor_at; // by block, tensor
    };

    const Tensor *tensor_at(uint64_t place);
    static bool is_row_of_each_stripe(const Tensor &tensor, const Rows &rows);

    std::vector<Tensor> tensors_; // in the order of the whole state
    std::vector<InBlocks> sections_;
    size_t last_ = 0; // the tensor that was found last
};

template <class Take>
void BlockMap::for_each(uint64_t place, uint64_t bytes, Take &&take) {
    while (bytes) {
        const Tensor *const tensor = tensor_at(place);
        if (!tensor) return;
        const InBlocks &section = sections_[tensor->section];
        uint64_t offset = place - tensor->begin;
        const uint64_t stripe = offset / tensor->stripe;
        offset %= tensor->stripe;
        const uint64_t cell = offset / tensor->unit;
        const uint64_t here = std::min({bytes, tensor->end - place, tensor->stripe - offset});
        // The first run that ends behind the cell.
        auto run =
            std::partition_point(section.runs.begin(), section.runs.end(),
                                 [&](const CellRun &one) { return one.first + one.count <= cell; });
        uint64_t done = 0;
        for (; run != section.runs.end() && done < here; ++run) {
            const uint64_t begin = std::max(run->first * tensor->unit, offset + done);
            const uint64_t end = std::min((run->first + run->count) * tensor->unit, offset + here);
            if (begin >= end) break;
            const uint64_t in_block = section.tensor_at[run->block][tensor->index] +
                                      stripe * section.cells[run->block] * tensor->unit +
                                      run->first_in_block * tensor->unit +
                                      (begin - run->first * tensor->unit);
            take(run->block, in_block, place + (begin - offset), end - begin);
            done = end - offset;
        }
        place += here;
        bytes -= here;
    }
}

template <class Take>
void BlockMap::for_each_rows(const Rows &rows, Take &&take) {
    const Tensor *const tensor = tensor_at(rows.place);
    if (tensor && is_row_of_each_stripe(*tensor, rows)) {
        for_each(rows.place, rows.width,
                 [&](size_t block, uint64_t offset, uint64_t place, uint64_t bytes) {
                     take(block, offset, Rows{place, bytes, rows.rows, rows.pitch},
                          sections_[tensor->section].cells[block] * tensor->unit);
                 });
        return;
    }
    const auto take_row = [&](size_t block, uint64_t offset, uint64_t place, uint64_t bytes) {
        take(block, offset, Rows{place, bytes, 1, bytes}, bytes);
    };
    if (rows.pitch > rows.width) {
        for (uint64_t row = 0; row < rows.rows; ++row)
            for_each(rows.place + row * rows.pitch, rows.width, take_row);
        return;
    }
    // There are no gaps between the rows. A run of one block may begin and end within a row.
    for_each(rows.place, rows.width * rows.rows,
             [&](size_t block, uint64_t offset, uint64_t place, uint64_t bytes) {
                 const uint64_t column = (place - rows.place) % rows.width;
                 const uint64_t before = std::min(column ? rows.width - column : 0, bytes);
                 if (before) take_row(block, offset, place, before);
                 const uint64_t whole = (bytes - before) / rows.width;
                 if (whole) {
                     take(block, offset + before,
                          Rows{place + before, rows.width, whole, rows.width}, rows.width);
                 }
                 const uint64_t done = before + whole * rows.width;
                 if (done < bytes) take_row(block, offset + done, place + done, bytes - done);
             });
}

} // namespace kvf
