// Fences: tensor memory that transfers in flight still read or write, and what has to wait for them.
//
// Decoding beside a transfer is right as long as llama.cpp writes only cells that the transfer does not concern. It
// does not always: a pending shift of one sequence rewrites the keys of all, a copy between streams overwrites a whole
// stream, a recurrent cache moves cells that are in its way. Each of these goes through a call that the tap watches. The
// hook asks here, and waits until the transfers that it would disturb have ended.
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

// What somebody is about to do with memory of tensors. WriteRows: to write the rows of tokens that are being decoded
// or loaded.
enum class Access { Read, Write, WriteRows };

// The numbers of the rows that a graph is about to write, where the graph tells them. They count from the beginning of
// the tensor that is written.
struct RowNumbers {
    const int64_t *numbers = nullptr;
    uint64_t count = 0;
};

// What a fence stands around.
struct Enclosure {
    // In order and apart.
    std::vector<MemoryRange> memory;
    // Also stops whoever writes rows of tokens anywhere in this memory.
    bool close = false;
    // The rows of one tensor that the transfer moves, in order and apart, and the bytes of one such row. Whoever writes
    // one of these rows waits. Empty, and 0: not known.
    std::vector<MemoryRange> rows = {};
    uint64_t row_bytes = 0;
    // Whether something has been done to the sequence that is moved, so that rows of others may be its own by now. Then
    // the fence is close from there on. Called by whoever is about to write rows of the same context. May be empty.
    std::function<bool()> is_disturbed = {};
    // Tells whose memory this is: the context.
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

    // True if any fence stands, or any close one. Cheap.
    static bool any() { return count_.load(std::memory_order_acquire) > 0; }
    static bool any_close() { return close_count_.load(std::memory_order_acquire) > 0; }
    // The memory within which all fences are.
    static MemoryRange extent();
    // Waits for the transfers that the access would disturb: a write waits for saves and loads, a read for loads.
    // Writing rows waits for close fences, and for those whose rows are among the numbers.
    static void wait(MemoryRange range, Access access, RowNumbers rows = {});
    // Waits for the transfers that move one of these rows. In order and apart.
    static void wait_for_rows(const std::vector<MemoryRange> &rows);
    // Waits for the transfers of this context whose sequences are disturbed.
    static void wait_for_disturbed(const void *context);

private:
    friend struct FenceLine;
    static inline std::atomic<uint32_t> count_{0}, close_count_{0}; // of those that stand
    const Direction direction_;
    Enclosure enclosure_; // guarded by the line's lock
    bool standing_ = false;
};

} // namespace kvf
