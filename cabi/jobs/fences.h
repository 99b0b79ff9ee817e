// Fences: the tensor memory that transfers in flight still read or write.
//
// Decoding beside a transfer is right as long as llama.cpp writes only cells that the transfer does
// not concern. Sometimes llama.cpp writes others: a pending shift of one sequence rewrites the keys
// of all sequences, a copy between streams overwrites a whole stream, a recurrent cache moves cells
// that are in its way, and the cells of a sequence that the program has removed go to other
// sequences. Each of these passes a call that the tap watches. The hook asks here, and waits until
// the transfers that it would disturb have ended.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "memory/layout.h"

namespace kvf {

// [begin, end) of a device's or the host's memory. Addresses are unique in a process.
struct MemoryRange {
    uint64_t begin, end;
};

// What a caller is about to do with memory of tensors. WriteRows: write the rows of tokens that are
// decoded or loaded.
enum class Access { Read, Write, WriteRows };

// The numbers of the rows that a graph is about to write, where the graph tells them. They count
// from the beginning of the tensor that is written.
struct RowNumbers {
    const int64_t *numbers = nullptr;
    uint64_t count = 0;
};

// What a fence protects.
struct Enclosure {
    // Sorted, without overlaps.
    std::vector<MemoryRange> memory;
    // Callers that write rows of tokens anywhere in this memory wait, too.
    bool stops_rows = false;
    // The rows of one tensor that the transfer moves, sorted and without overlaps, and the bytes of
    // one row. A caller that writes one of these rows waits. Empty, and 0: not known.
    std::vector<MemoryRange> rows = {};
    uint64_t row_bytes = 0;
    // Whether the program has changed the sequence that is moved, so that its cells may belong to
    // other sequences. From then on the fence stops rows. Called by threads that are about to write
    // rows of the same context. May be empty.
    std::function<bool()> is_disturbed = {};
    // The llama_context whose memory this is.
    const void *context = nullptr;
};

// The fence of one transfer. It stands from raise() to lower(), or to its end.
class Fence {
public:
    explicit Fence(Direction direction) : direction_(direction) {}
    ~Fence() { lower(); }
    Fence(const Fence &) = delete;
    Fence &operator=(const Fence &) = delete;

    void raise(Enclosure enclosure);
    void lower() noexcept;

    // Whether any fence stands, or any that stops rows. Cheap.
    static bool any() { return count_.load(std::memory_order_acquire) > 0; }
    static bool any_stops_rows() { return row_stopping_count_.load(std::memory_order_acquire) > 0; }
    // From the first byte that any fence protects to the last.
    static MemoryRange extent();
    // Waits for the transfers that the access would disturb: a write waits for saves and loads, a
    // read for loads. Writing rows waits for fences that stop rows, and for those that protect one
    // of the rows.
    static void wait(MemoryRange range, Access access, RowNumbers rows = {});
    // Waits for the transfers that move one of these rows; sorted, without overlaps.
    static void wait_for_rows(const std::vector<MemoryRange> &rows);
    // Waits for the transfers of this context whose sequences are disturbed.
    static void wait_for_disturbed(const void *context);

private:
    friend struct FenceLine;
    static inline std::atomic<uint32_t> count_{0}, row_stopping_count_{0}; // of those that stand
    const Direction direction_;
    Enclosure enclosure_; // guarded by the line's lock
    bool standing_ = false;
};

} // namespace kvf
