// A llama_context as libllama's functions show it: its model, its limits, and its sequences.
#pragma once

#include <string>

#include "llama/api.h"
#include "llama/recorder.h"
#include "states/formats.h"

namespace kvf {

// All but the functions that say otherwise belong to the context's thread.
class LlamaContext {
public:
    // Throws what find_llama() throws, and KVF_ERR_UNSUPPORTED for a context without memory.
    LlamaContext(llama_context *context, const char *library);

    const LlamaApi &api() const { return api_; }
    llama_context *pointer() const { return context_; }
    const llama_model *model() const { return model_; }
    // What describe() of the attachment says of library and model: members of a JSON object. Any
    // thread; the model may be gone.
    std::string describe() const;
    uint64_t fingerprint_number() const { return std::stoull(fingerprint_, nullptr, 16); }

    // The context's address holds another one by now. (This reads freed memory: it is a chance to
    // stop in time, not a guarantee.)
    bool is_replaced() const { return api_.get_model(context_) != model_; }

    uint32_t sequence_count() const { return sequence_count_; } // they are numbered from 0
    uint32_t most_cells() const;                                // that a sequence may have
    int32_t window() const { return window_; } // of sliding-window layers in tokens, or 0
    int32_t last_sane_position() const { return last_sane_position_; } // in a state that is whole
    bool has_recurrent_layers() const;

    // Negative for an empty sequence.
    int32_t first_position(int32_t sequence) const;
    int32_t last_position(int32_t sequence) const;
    bool holds_cells(int32_t sequence) const { return last_position(sequence) >= 0; }
    void remove(int32_t sequence) const;
    // Lets `to` share the cells of `from` at the positions [begin, end).
    void share(int32_t from, int32_t to, int32_t begin, int32_t end) const;

    // Which state of a sequence: all of it, or windows and recurrent layers alone, which is
    // LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY of llama.h.
    enum class Extent : uint32_t { Whole = 0, Partial = 1 };

    // 0: libllama refuses.
    uint64_t state_bytes(int32_t sequence, Extent extent = Extent::Whole) const;
    // Has libllama write the state, whose tensor bytes the recorder notes. Returns the bytes of the
    // state. Throws KVF_ERR_BUFFER_TOO_SMALL or KVF_ERR_LLAMA.
    uint64_t write_state(int32_t sequence, unsigned char *buffer, uint64_t bytes,
                         Recorder &recorder, Extent extent = Extent::Whole) const;
    // Has libllama take the state, whose tensor bytes the recorder notes. False where it did not
    // take all of it.
    bool read_state(int32_t sequence, const StateView &view, Recorder &recorder) const;

private:
    llama_memory memory() const { return api_.get_memory(context_); }

    llama_context *const context_;
    const LlamaApi api_;
    const llama_model *const model_;
    const uint32_t sequence_count_;
    const int32_t window_;
    const int32_t last_sane_position_;
    const std::string model_text_, fingerprint_;
};

} // namespace kvf
