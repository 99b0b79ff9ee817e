// Memory for states that libllama writes or takes, and of which only the metadata is of interest.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>

namespace kvf {

// Address space for a state of which only the few bytes between the tensors will be written.
class ScratchState {
public:
    explicit ScratchState(uint64_t bytes); // throws KVF_ERR_OUT_OF_MEMORY
    ~ScratchState();
    ScratchState(const ScratchState &) = delete;
    ScratchState &operator=(const ScratchState &) = delete;

    ScratchState(ScratchState &&other) noexcept
        : data(std::exchange(other.data, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

    unsigned char *data;
    uint64_t bytes() const { return bytes_; }

private:
    uint64_t bytes_;
};

// Keeps a scratch state for the next one. The metadata of a state stands in a page for each tensor,
// and the system takes a microsecond or more to map a page and to unmap it again.
//
// Belongs to one context, whose thread alone uses it. So it has no lock.
class ScratchCache {
public:
    // States of other sizes have their metadata in other pages. The memory is unmapped after so
    // many of them, so that a thousand kept pages are the most.
    static constexpr uint32_t kMostUses = 16;

    // Returns a scratch state of `bytes` or more, with whatever the last one held. Throws as
    // ScratchState() does.
    ScratchState take(uint64_t bytes);
    // Keeps a state that take() has returned, unless the address space is limited.
    void keep(ScratchState &&state) noexcept;

private:
    std::optional<ScratchState> kept_;
    uint32_t uses_ = 0; // of the one that was kept or taken last
};

// A scratch state from the cache, which goes back there.
class BorrowedScratch {
public:
    BorrowedScratch(ScratchCache &cache, uint64_t bytes)
        : cache_(cache), state_(cache.take(bytes)), data(state_.data) {}
    ~BorrowedScratch() { cache_.keep(std::move(state_)); }
    BorrowedScratch(const BorrowedScratch &) = delete;
    BorrowedScratch &operator=(const BorrowedScratch &) = delete;

    uint64_t bytes() const { return state_.bytes(); }

private:
    ScratchCache &cache_;
    ScratchState state_;

public:
    unsigned char *const data;
};

} // namespace kvf
