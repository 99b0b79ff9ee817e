// What a transfer consists of: regions of one device. LayoutBuilder joins them while they are
// recorded; Parts hands them out in pieces.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/status.h"

namespace kvf {

enum class Direction : uint32_t { Save = 0, Load = 1 };

// A fragment that joined no other: one of the irregular rest. Always smaller than kLongRun.
struct Run {
    uint64_t address;
    uint64_t offset; // in the buffer
    uint64_t bytes;
};

// The irregular rest of one tensor.
struct RunTable {
    std::vector<Run> runs;
    bool packed; // in the buffer each run begins where the one before it ends
};

// A stretch of the irregular rest: the first `count` runs of a table, all moved by the same
// distances. The tensors of a cache are fragmented alike, so that one table serves them all.
struct Span {
    std::shared_ptr<const RunTable> table;
    uint64_t count = 0;
    uint64_t address_distance = 0, offset_distance = 0; // modulo 2^64
};

// A run of this many bytes is worth a copy of its own.
constexpr uint64_t kLongRun = 64 << 10;
// Fewer rows than this are not worth a two-dimensional copy of their own.
constexpr uint64_t kFewRows = 8;
// Where the buffer has no more bytes than this between two pieces, one copy can move both and the
// gap: libllama writes 12 bytes of metadata between two tensors.
constexpr uint64_t kBridge = 256;

// Regions of one device, in the order in which they were recorded.
struct Layout {
    std::vector<kvf_region> regions; // long runs (rows == 1) and two-dimensional regions
    std::vector<Span> spans;         // the irregular rest
    uint64_t bytes = 0;
    // Promises for the range of the buffer from the layout's first byte to its last: one buffer
    // holds the range; regions and runs were added in the order of their offsets; what lies between
    // them has been written already, and nobody else writes there until the job has ended. A save
    // may then write these gaps again, unchanged, so that one copy moves many small regions. A job
    // whose bytes lie in several buffers has a layout for each of them.
    bool owns_gaps = false;
    // Of a save of blocks: the index of the block that the bytes belong to.
    uint32_t block = 0;

    bool empty() const { return regions.empty() && spans.empty(); }
    uint64_t segments() const {
        uint64_t count = regions.size();
        for (const Span &span : spans) count += span.count;
        return count;
    }
};

// Checks regions that came from outside: no zero sizes, no overflow, pitches at least as wide as
// rows. Returns the size of the buffer that they need. Throws KVF_ERR_INVALID_ARGUMENT.
uint64_t regions_size(const kvf_region *regions, uint64_t count);

} // namespace kvf
