// The sequences of one llama_context, shared by all attachments to the context, of all engines:
// which transfers are in flight, which sequences a failed load has left to be emptied, and whether
// the context has been freed.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <vector>

#include "llama/api.h"
#include "memory/layout.h"

namespace kvf {

class LlamaSequences {
public:
    // The one object of a context, while an attachment holds it. (The model tells a context from a
    // later one that was made at its address, mostly.)
    static std::shared_ptr<LlamaSequences> of(const llama_context *context,
                                              const llama_model *model);

    explicit LlamaSequences(const llama_model *model) : model_(model) {}

    struct Transfer {
        int32_t sequence;
        Direction direction;
        bool blocking; // by libllama's own call, on one of the library's threads
    };
    void begin(const Transfer &transfer);
    // A load that did not end well leaves its sequence to be emptied. Needs no memory.
    void end(const Transfer &transfer, int32_t status) noexcept;

    // Throws KVF_ERR_BUSY where the sequence has transfers of this kind in flight.
    enum class Busy { WithLoads, WithAny };
    void check_idle(int32_t sequence, Busy busy) const;
    bool is_idle(int32_t sequence) const; // and not to be emptied
    // Throws KVF_ERR_BUSY while a blocking transfer uses the context.
    void check_at_rest() const;
    bool is_at_rest() const;

    // The sequences to be emptied, which are then no longer known here. Throws KVF_ERR_BUSY as
    // check_at_rest() does if there are any.
    std::set<int32_t> take_to_be_emptied();
    void forget(int32_t sequence);

    // Where its cache lies, as far as has been seen.
    void note_tensors(const std::vector<uint64_t> &addresses);
    std::optional<uint64_t> any_tensor() const;

    // A buffer of tensors is about to be freed. True if it is the context's, whose memory goes with
    // it.
    bool note_buffer_freed(uint64_t begin, uint64_t bytes);
    bool is_freed() const;

private:
    // Kept as long as any of it says something.
    struct Sequence {
        uint32_t saves = 0, loads = 0; // in flight
        bool to_be_emptied = false;
    };
    using Sequences = std::map<int32_t, Sequence>;

    void check_at_rest_locked() const;
    void drop_if_idle(Sequences::iterator it) noexcept;

    const llama_model *const model_;
    mutable std::mutex mutex_;
    Sequences sequences_;
    uint32_t blocking_ = 0; // transfers in flight
    std::set<uint64_t> tensors_;
    bool freed_ = false;
};

} // namespace kvf
