// The recorder: collects what one call of libllama would have moved.
#pragma once

#include <exception>
#include <functional>
#include <string>
#include <vector>

#include "engine/submission.h"
#include "jobs/fences.h"
#include "llama/api.h"
#include "llama/block_cache.h"
#include "llama/formats.h"
#include "memory/layout_builder.h"

namespace kvf {

// Collects what one thread's call of libllama would have moved.
class Recorder {
public:
    // Says which device of the engine holds [address, address + bytes). Negative: none of them. What it throws
    // is thrown by finish() again.
    using Locate = std::function<int64_t(uint64_t address, uint64_t bytes)>;

    // Takes what has been recorded so far, of a device: it may be moved while the rest is recorded.
    using Sink = std::function<void(uint32_t device, Layout &&)>;

    Recorder(Direction direction, const void *buffer, uint64_t bytes, uint32_t devices,
             Locate locate, BlockCache &blocks);

    // Called as soon as there are `least` bytes for it. Without one, everything is kept until finish().
    void set_sink(Sink sink, uint64_t least) {
        sink_ = std::move(sink);
        least_part_ = least;
    }

    // These bytes of the buffer, in order and apart, are kept apart from the rest: they are to be moved before the
    // submitting call returns. Before recording.
    void set_early(std::vector<ByteRange> ranges) { early_ = std::move(ranges); }

    // What was recorded; its layouts are those that the sink has not been given. Its bytes are those of tensors,
    // early ones included. Throws if it could not be recorded whole.
    Recorded finish();
    // After finish(): the layouts of the early bytes.
    Layouts take_early() { return std::move(early_layouts_); }

    // The addresses of the tensors that were concerned.
    const std::vector<uint64_t> &tensors() const { return tensors_; }
    // The memory that was recorded: for each tensor, from its first fragment to its last. In order, and apart.
    std::vector<MemoryRange> memory() const;
    // What was recorded of the first tensor, if the engine moves it: the rows of the keys of one layer, where the cache
    // has attention. In order, and apart.
    std::vector<MemoryRange> first_tensor() const;

    // The text of the assertion that failed in libllama, or "".
    const std::string &abort_text() const { return abort_text_; }

    // True if the call concerned this recorder's buffer and is thereby done.
    bool record(const ggml_tensor *tensor, const void *data, uint64_t offset, uint64_t bytes,
                Direction direction, const GgmlApi &ggml) noexcept;
    BlockCache &blocks() { return blocks_; }
    void note_abort(std::string text) { abort_text_ = std::move(text); }

private:
    const Direction direction_;
    const uint64_t buffer_, buffer_bytes_;
    Locate locate_;
    BlockCache &blocks_;
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
    bool is_plain_ = true; // what is recorded of it needs no care
    const ggml_tensor *tensor_ = nullptr;
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
    void add_with_care(uint64_t address, uint64_t place, uint64_t bytes);
};

// While it lives, calls of this thread are recorded.
class Recording {
public:
    explicit Recording(Recorder &recorder);
    ~Recording();
    // The recorder of this thread's calls; NULL where none are recorded.
    static Recorder *current();
    Recording(const Recording &) = delete;
    Recording &operator=(const Recording &) = delete;
};

} // namespace kvf
