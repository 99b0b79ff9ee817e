// The layout of a state becomes layouts of blocks: the same bytes as fragment by fragment, in few
// regions, and with one table for all tensors of a block.
#include "llama/spreader.h"

#include <algorithm>
#include <numeric>
#include <random>

#include "check.h"
#include "memory/layout_builder.h"
#include "memory/pieces.h"

namespace {

using Random = std::mt19937;

constexpr uint64_t kGap = 12; // between the tensors of a state
constexpr uint32_t kElement = 2;

// A section of attention, K and V of some layers, and a sequence in it.
struct Cache {
    uint64_t layers, row, cells;  // cells of the cache
    bool transposed;              // V
    std::vector<uint64_t> at;     // the cache's cell of each cell of the state, ascending
    std::vector<size_t> block;    // of each cell of the state; `blocks`: none
    std::vector<uint64_t> places; // where each block begins in the buffer

    size_t blocks() const { return places.size(); }
    uint64_t tensor_bytes() const { return cells * row; }
    bool is_transposed(uint64_t tensor) const { return transposed && tensor >= layers; }

    kvf::Section section(uint64_t count) const {
        kvf::Section section;
        section.cells = count;
        uint64_t place = 100;
        for (uint64_t tensor = 0; tensor < 2 * layers; ++tensor) {
            section.tensors.push_back({1, row, is_transposed(tensor) ? kElement : 0});
            section.tensor_at.push_back(place);
            place += count * row + kGap;
        }
        return section;
    }
    kvf::Section of_block(size_t index) const {
        return section(static_cast<uint64_t>(std::count(block.begin(), block.end(), index)));
    }
    kvf::BlockMap map() const {
        std::vector<kvf::Section> sections;
        for (size_t i = 0; i < blocks(); ++i) sections.push_back(of_block(i));
        std::vector<const kvf::Section *> pointers;
        for (const kvf::Section &section : sections) pointers.push_back(&section);
        std::vector<uint64_t> filled(blocks());
        std::vector<kvf::CellRun> runs;
        for (uint64_t cell = 0; cell < at.size(); ++cell) {
            const size_t to = block[cell];
            if (to == blocks()) continue;
            if (!runs.empty() && runs.back().block == to &&
                runs.back().first + runs.back().count == cell) {
                ++runs.back().count;
            } else {
                runs.push_back({cell, 1, to, filled[to]});
            }
            ++filled[to];
        }
        kvf::BlockMap map;
        map.add_section(section(at.size()), pointers, std::move(runs));
        return map;
    }
    // Calls add(address, place, bytes) for each fragment, as libllama names them.
    template <class BeginTensor, class Add>
    void for_each_fragment(BeginTensor &&begin_tensor, Add &&add) const {
        const kvf::Section whole = section(at.size());
        for (uint64_t tensor = 0; tensor < 2 * layers; ++tensor) {
            begin_tensor();
            const bool by_element = is_transposed(tensor);
            const uint64_t unit = by_element ? kElement : row;
            for (uint64_t i = 0; i < row / unit; ++i) {
                for (uint64_t cell = 0; cell < at.size();) {
                    uint64_t count = 1;
                    while (cell + count < at.size() && at[cell + count] == at[cell] + count)
                        ++count;
                    add(tensor * tensor_bytes() + (i * cells + at[cell]) * unit,
                        whole.tensor_at[tensor] + (i * at.size() + cell) * unit, count * unit);
                    cell += count;
                }
            }
        }
    }
    kvf::Layout layout() const {
        kvf::LayoutBuilder builder;
        for_each_fragment([&] { builder.begin_tensor(); },
                          [&](uint64_t address, uint64_t place, uint64_t bytes) {
                              builder.add(address, place, bytes);
                          });
        return builder.finish();
    }
};

// Where each byte of the cache lies in the buffer; 0: nowhere.
using Bytes = std::vector<uint64_t>;

void note(Bytes &bytes, uint64_t address, uint64_t offset, uint64_t count) {
    for (uint64_t i = 0; i < count; ++i) {
        CHECK(bytes[address + i] == 0);
        bytes[address + i] = offset + i;
    }
}

// By the definition of a block: its cells in their order, tensor by tensor.
Bytes expected(const Cache &cache) {
    Bytes bytes(2 * cache.layers * cache.tensor_bytes());
    std::vector<kvf::Section> sections;
    for (size_t i = 0; i < cache.blocks(); ++i) sections.push_back(cache.of_block(i));
    std::vector<uint64_t> filled(cache.blocks());
    for (uint64_t cell = 0; cell < cache.at.size(); ++cell) {
        const size_t block = cache.block[cell];
        if (block == cache.blocks()) continue;
        const kvf::Section &section = sections[block];
        const uint64_t in_block = filled[block]++;
        for (uint64_t tensor = 0; tensor < 2 * cache.layers; ++tensor) {
            const uint64_t unit = cache.is_transposed(tensor) ? kElement : cache.row;
            for (uint64_t i = 0; i < cache.row / unit; ++i) {
                note(bytes,
                     tensor * cache.tensor_bytes() + (i * cache.cells + cache.at[cell]) * unit,
                     cache.places[block] + section.tensor_at[tensor] +
                         (i * section.cells + in_block) * unit,
                     unit);
            }
        }
    }
    return bytes;
}

void note(Bytes &bytes, const kvf::Layout &layout) {
    uint64_t moved = 0;
    kvf::Cursor cursor(layout);
    while (!cursor.at_end()) {
        const kvf::Piece piece = cursor.next(UINT64_MAX, UINT64_MAX);
        for (uint64_t i = 0; i < piece.rows(); ++i) {
            const kvf::Run run = piece.runs
                                     ? piece.run(i)
                                     : kvf::Run{piece.region.address + i * piece.region.pitch,
                                                piece.region.offset + i * piece.region.buffer_pitch,
                                                piece.region.width};
            note(bytes, run.address, run.offset, run.bytes);
            moved += run.bytes;
        }
    }
    CHECK(moved == layout.bytes);
}

std::vector<kvf::Layout> spread(const Cache &cache) {
    return kvf::Spreader(cache.map(), cache.places).spread(cache.layout());
}

void check(const Cache &cache) {
    Bytes bytes(2 * cache.layers * cache.tensor_bytes());
    for (const kvf::Layout &layout : spread(cache)) {
        note(bytes, layout);
        CHECK(std::is_sorted(
            layout.regions.begin(), layout.regions.end(),
            [](const kvf_region &a, const kvf_region &b) { return a.offset < b.offset; }));
    }
    CHECK(bytes == expected(cache));
}

// Blocks of `tokens` cells, in buffers below one another. The sequence has every `step`-th cell.
Cache cache_of(uint64_t tokens, size_t blocks, uint64_t step, bool transposed) {
    Cache cache{3, 8, tokens * blocks * step, transposed, {}, {}, {}};
    for (uint64_t cell = 0; cell < tokens * blocks; ++cell) {
        cache.at.push_back(cell * step);
        cache.block.push_back(cell / tokens);
    }
    for (size_t i = 0; i < blocks; ++i) cache.places.push_back((blocks - i) * 10'000'000);
    return cache;
}

void regions_are_cut_as_a_whole() {
    for (const uint64_t step : {1, 4}) {
        Cache cache = cache_of(256, 5, step, false);
        cache.row = 256;
        const auto parts = spread(cache);
        CHECK(parts.size() == 5);
        for (const kvf::Layout &part : parts) CHECK(part.spans.empty() && part.regions.size() == 6);
        check(cache);
    }
    // V: as many rows as elements.
    Cache cache = cache_of(32, 5, 1, true);
    cache.row = 2 * 2048;
    cache.cells *= 2;
    for (const kvf::Layout &part : spread(cache)) {
        CHECK(part.regions.size() == 6 && part.spans.empty());
        CHECK(part.regions.back().rows == 2048 && part.regions.back().width == 64);
    }
    check(cache);
}

void tables_are_shared_by_tensors() {
    Random random(2);
    Cache cache = cache_of(64, 4, 4, false);
    for (uint64_t &at : cache.at) at += random() % 4;
    const auto parts = spread(cache);
    CHECK(parts.size() == 4);
    for (const kvf::Layout &part : parts) {
        CHECK(part.spans.size() == 6);
        for (const kvf::Span &span : part.spans)
            CHECK(span.table == part.spans.front().table && span.count > 40);
    }
    check(cache);
}

void any_cells_and_any_blocks() {
    Random random(1);
    const auto between = [&](uint64_t least, uint64_t most) {
        return std::uniform_int_distribution<uint64_t>(least, most)(random);
    };
    for (int round = 0; round < 400; ++round) {
        Cache cache{between(1, 3), 2 * between(1, 12), 300, between(0, 1) == 1, {}, {}, {}};
        const size_t blocks = between(1, 5);
        const uint64_t step = between(1, 3), scatter = between(0, 3);
        size_t block = between(0, blocks);
        const uint64_t stay = between(1, 40);
        for (uint64_t cell = 0; cell < 300; cell += step) {
            if (scatter == 1 && between(0, 3) == 0) continue;
            if (between(0, stay) == 0) block = between(0, blocks);
            cache.at.push_back(cell);
            cache.block.push_back(block);
        }
        std::vector<size_t> order(blocks);
        std::iota(order.begin(), order.end(), 1);
        std::shuffle(order.begin(), order.end(), random);
        for (const size_t place : order) cache.places.push_back(place * 1'000'000);
        check(cache);
    }
}

} // namespace

int main() {
    regions_are_cut_as_a_whole();
    tables_are_shared_by_tensors();
    any_cells_and_any_blocks();
    return 0;
}
