// Which byte of memory belongs to which byte of the buffer, and how often: the model that layouts
// and pieces are compared with. Two sets of fragments that move the same bytes have equal coverage,
// however they are cut or joined.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <utility>

#include "memory/pieces.h"

// How many runs a layout's tables hold, each counted once.
inline uint64_t runs_of(const kvf::Layout &layout) {
    std::set<const kvf::RunTable *> tables;
    for (const auto &span : layout.spans) tables.insert(span.table.get());
    uint64_t runs = 0;
    for (const auto *table : tables) runs += table->runs.size();
    return runs;
}

class Coverage {
public:
    void add(uint64_t address, uint64_t offset, uint64_t bytes) {
        // Bytes whose address and offset grow together lie on one line; on it, where the count
        // changes.
        change(address - offset, offset, 1);
        change(address - offset, offset + bytes, -1);
        bytes_ += bytes;
    }

    void add(const kvf_region &region) {
        for (uint64_t i = 0; i < region.rows; ++i) {
            add(region.address + i * region.pitch, region.offset + i * region.buffer_pitch,
                region.width);
        }
    }

    void add(const kvf::Piece &piece) {
        if (!piece.runs) return add(piece.region);
        for (uint64_t i = 0; i < piece.count; ++i) {
            const kvf::Run run = piece.run(i);
            add(run.address, run.offset, run.bytes);
        }
    }

    uint64_t bytes() const { return bytes_; }
    bool operator==(const Coverage &) const = default;

private:
    void change(uint64_t line, uint64_t at, int by) {
        const auto it = changes_.emplace(std::pair(line, at), 0).first;
        it->second += by;
        if (it->second == 0) changes_.erase(it);
    }

    std::map<std::pair<uint64_t, uint64_t>, int64_t> changes_;
    uint64_t bytes_ = 0;
};
