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

// The fence of one transfer. It stands from raise() to lower(), or to its end.
class Fence {
public:
    explicit Fence(Direction direction) : direction_(direction) {}
    ~Fence() { lower(); }
    Fence(const Fence &) = delete;
    Fence &operator=(const Fence &) = delete;

    // Around these ranges, which must be in order and apart. `close` also stops who writes rows of tokens.
    void raise(std::vector<MemoryRange> ranges, bool close = false);
    void lower() noexcept;

    // True if any fence stands, or any close one. Cheap.
    static bool any() { return count_.load(std::memory_order_acquire) > 0; }
    static bool any_close() { return close_count_.load(std::memory_order_acquire) > 0; }
    // The memory within which all fences are.
    static MemoryRange extent();
    // Waits for the transfers that the access would disturb: a write waits for saves and loads, a read for loads, and
    // writing rows for close fences.
    static void wait(MemoryRange range, Access access);

private:
    friend struct FenceLine;
    static inline std::atomic<uint32_t> count_{0}, close_count_{0}; // of those that stand
    const Direction direction_;
    std::vector<MemoryRange> ranges_; // guarded by the line's lock
    bool standing_ = false;
    bool close_ = false;
};

} // namespace kvf
