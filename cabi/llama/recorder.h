// The recorder: collects what one call of libllama would have moved.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "engine/submission.h"
#include "jobs/fences.h"
#include "llama/api.h"
#include "llama/heap_cache.h"
#include "memory/layout_builder.h"
#include "states/cells.h"

namespace kvf {

// Collects what one thread's call of libllama would have moved.
class Recorder {
public:
    // Returns the engine's device that holds [address, address + bytes); negative: none does.
    // finish() rethrows its exceptions.
    using Locate = std::function<int64_t(uint64_t address, uint64_t bytes)>;

    // Takes the part of a device that has been recorded so far. It may be moved while the rest is
    // recorded.
    using Sink = std::function<void(uint32_t device, Layout &&)>;

    // `total_calls`: of the tap; the end of a Recording adds what it has recorded. It must outlive
    // the Recording.
    Recorder(Direction direction, const void *buffer, uint64_t bytes, uint32_t devices,
             Locate locate, HeapCache &heap, std::atomic<uint64_t> *total_calls);

    // Called when a tensor begins and `least` bytes or more have been recorded for the sink.
    // Without a sink, finish() returns everything.
    void set_sink(Sink sink, uint64_t least) {
        sink_ = std::move(sink);
        least_part_ = least;
    }

    // These bytes of the buffer, sorted, without overlap, are collected separately, for
    // take_early(), because they must be moved before the submitting call returns. Call before
    // recording.
    void set_early(std::vector<ByteRange> ranges) { early_ = std::move(ranges); }

    // What was recorded, with the layouts that the sink has not taken. `bytes` counts all tensor
    // bytes, early ones included. Throws if something could not be recorded.
    Recorded finish();
    // After finish(): the layouts of the early bytes.
    Layouts take_early() { return std::move(early_layouts_); }

    // The addresses of the recorded tensors.
    const std::vector<uint64_t> &tensors() const { return tensors_; }
    // The recorded memory: for each tensor, from its first fragment to its last. Sorted, without
    // overlaps.
    std::vector<MemoryRange> memory() const;
    // The recorded fragments of the first tensor, if the engine moves it. In an attention cache
    // these are the rows of one layer's keys. Sorted, without overlaps.
    std::vector<MemoryRange> first_tensor() const;

    // The text of the assertion that failed in libllama, or "".
    const std::string &abort_text() const { return abort_text_; }

    // Called for each copy that libllama makes. True: the copy was recorded, or must not be made;
    // false: the caller makes it.
    bool record(const ggml_tensor *tensor, const void *data, uint64_t offset, uint64_t bytes,
                Direction direction, const GgmlApi &ggml) noexcept {
        const uint64_t place = reinterpret_cast<uint64_t>(data) - buffer_;
        if (direction != direction_ || place >= buffer_bytes_ || bytes > buffer_bytes_ - place)
            return false;
        // Half a million fragments come here.
        if (tensor != plain_tensor_) return record_with_care(tensor, place, offset, bytes, ggml);
        ++calls_;
        const uint64_t address = tensor_address_ + offset;
        note_reached(address, bytes);
        try {
            builder_->add(address, place, bytes);
        } catch (...) {
            note_failure();
        }
        return true;
    }
    // Adds to the tap's counter what was recorded since the last report.
    void report_calls() noexcept {
        if (total_calls_)
            total_calls_->fetch_add(std::exchange(calls_, 0), std::memory_order_relaxed);
    }
    HeapCache &heap() { return heap_; }
    void note_abort(std::string text) { abort_text_ = std::move(text); }

private:
    const Direction direction_;
    const uint64_t buffer_, buffer_bytes_;
    Locate locate_;
    HeapCache &heap_;
    std::atomic<uint64_t> *const total_calls_;
    std::vector<LayoutBuilder> builders_;       // by device
    std::vector<LayoutBuilder> early_builders_; // by device, of the early bytes
    LayoutBuilder *builder_ = nullptr;          // of the tensor below
    LayoutBuilder *early_builder_ = nullptr;
    std::vector<ByteRange> early_;
    size_t next_early_ = 0; // the first that may concern what is still to come
    Layouts early_layouts_;
    std::vector<MemoryRange> memory_;    // of each former tensor
    MemoryRange reached_{UINT64_MAX, 0}; // of the present one
    std::vector<MemoryRange> first_tensor_;
    const ggml_tensor *tensor_ = nullptr;
    // The same tensor where its fragments need no care: a device of the engine reaches it, no early
    // ranges and no fences concern it, it is not the first, and nothing has failed. Otherwise NULL.
    const ggml_tensor *plain_tensor_ = nullptr;
    uint64_t calls_ = 0; // that were recorded since the last report
    uint64_t tensor_address_ = 0;
    uint64_t direct_fragments_ = 0, direct_bytes_ = 0; // copied by the original call
    std::vector<uint64_t> tensors_;
    Sink sink_;
    uint64_t least_part_ = 0;
    uint64_t sunk_segments_ = 0, sunk_bytes_ = 0; // of what the sink was given
    uint64_t listed_ns_ = 0;                      // when the first fragment came
    std::exception_ptr failure_;
    std::string abort_text_;

    void begin_tensor(const ggml_tensor *tensor, uint64_t offset, uint64_t bytes,
                      const GgmlApi &ggml);
    void end_first_tensor();
    bool record_with_care(const ggml_tensor *tensor, uint64_t place, uint64_t offset,
                          uint64_t bytes, const GgmlApi &ggml) noexcept;
    void add_with_care(uint64_t address, uint64_t place, uint64_t bytes);
    void note_reached(uint64_t address, uint64_t bytes) {
        reached_.begin = std::min(reached_.begin, address);
        reached_.end = std::max(reached_.end, address + bytes);
    }
    void note_failure() noexcept;
};

// While it lives, calls of this thread are recorded.
class Recording {
public:
    explicit Recording(Recorder &recorder);
    ~Recording();
    // The recorder of this thread's calls; NULL where none are recorded.
    static Recorder *current() { return recorder_; }
    Recording(const Recording &) = delete;
    Recording &operator=(const Recording &) = delete;

private:
    static inline constinit thread_local Recorder *recorder_ = nullptr;
};

} // namespace kvf
