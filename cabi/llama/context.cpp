#include "llama/context.h"

#include <algorithm>
#include <string_view>

#include "core/json.h"
#include "memory/buffer_checks.h"

namespace kvf {
namespace {

// Identity of the model: all that libllama tells of it, FNV-1a. No public function leads from a
// model to its weights, nor from a context to its adapters. kFingerprintCovers says the same to
// callers.
std::string fingerprint(const LlamaApi &api, const llama_model *model) {
    uint64_t hash = 0xcbf29ce484222325u;
    const auto mix = [&](std::string_view bytes) {
        for (const unsigned char c : bytes) hash = (hash ^ c) * 0x100000001b3u;
        hash = (hash ^ 0xff) * 0x100000001b3u; // so that "ab", "c" is not "a", "bc"
    };
    char text[1024];
    if (api.model_desc(model, text, sizeof text) >= 0) mix(text);
    mix(std::to_string(api.model_n_params(model)));
    mix(std::to_string(api.model_size(model)));
    const int32_t count = api.model_meta_count(model);
    for (int32_t i = 0; i < count; ++i) {
        if (api.model_meta_key_by_index(model, i, text, sizeof text) >= 0) mix(text);
        if (api.model_meta_val_str_by_index(model, i, text, sizeof text) >= 0) mix(text);
    }
    return format("%016llx", static_cast<unsigned long long>(hash));
}

constexpr const char *kFingerprintCovers =
    R"(["model description", "model size", "number of parameters", "model metadata"])";

std::string describe_model(const LlamaApi &api, const llama_model *model) {
    char text[256] = "";
    api.model_desc(model, text, sizeof text);
    return text;
}

// A position beyond which no state is whole. A conversation may go on for longer than the context
// has cells, as tokens are removed or a window slides on, so the bound is generous; what matters is
// that decoding can go on from it.
int32_t last_sane_position(const LlamaApi &api, const llama_model *model,
                           const llama_context *context) {
    constexpr int64_t kLeast = 1 << 24, kMost = INT32_MAX - (1 << 24);
    const int64_t trained = std::max(api.model_n_ctx_train(model), 0);
    const int64_t longest = std::max<int64_t>(trained, api.n_ctx(context));
    return static_cast<int32_t>(std::clamp(16 * longest, kLeast, kMost));
}

} // namespace

LlamaContext::LlamaContext(llama_context *context, const char *library)
    : context_(context), api_(find_llama(library)), model_(api_.get_model(context)),
      sequence_count_(api_.n_seq_max(context)), window_(api_.model_n_swa(model_)),
      last_sane_position_(kvf::last_sane_position(api_, model_, context)),
      model_text_(describe_model(api_, model_)), fingerprint_(fingerprint(api_, model_)) {
    if (!memory()) {
        throw Error(KVF_ERR_UNSUPPORTED, "the context has no memory: its model keeps no state");
    }
}

std::string LlamaContext::describe() const {
    return "\"library\": " + json_quote(api_.path) +
           ", \"ggml_version\": " + json_quote(api_.ggml.version ? api_.ggml.version() : "") +
           ", \"ggml_commit\": " + json_quote(api_.ggml.commit ? api_.ggml.commit() : "") +
           ", \"model\": " + json_quote(model_text_) +
           ", \"fingerprint\": " + json_quote(fingerprint_) +
           ", \"fingerprint_covers\": " + kFingerprintCovers;
}

bool LlamaContext::has_recurrent_layers() const {
    return api_.model_is_recurrent(model_) ||
           (api_.model_is_hybrid && api_.model_is_hybrid(model_));
}

uint32_t LlamaContext::most_cells() const {
    return api_.n_ctx_seq ? api_.n_ctx_seq(context_) : api_.n_ctx(context_);
}

int32_t LlamaContext::first_position(int32_t sequence) const {
    return api_.memory_seq_pos_min(memory(), sequence);
}

int32_t LlamaContext::last_position(int32_t sequence) const {
    return api_.memory_seq_pos_max(memory(), sequence);
}

void LlamaContext::remove(int32_t sequence) const {
    api_.memory_seq_rm(memory(), sequence, -1, -1);
}

void LlamaContext::share(int32_t from, int32_t to, int32_t begin, int32_t end) const {
    api_.memory_seq_cp(memory(), from, to, begin, end);
}

uint64_t LlamaContext::state_bytes(int32_t sequence, Extent extent) const {
    return api_.state_seq_get_size(context_, sequence, static_cast<uint32_t>(extent));
}

uint64_t LlamaContext::write_state(int32_t sequence, unsigned char *buffer, uint64_t bytes,
                                   Recorder &recorder, Extent extent) const {
    uint64_t written = 0;
    try {
        Recording recording(recorder);
        written = api_.state_seq_get_data(context_, buffer, bytes, sequence,
                                          static_cast<uint32_t>(extent));
    } catch (...) {
        written = 0; // an assertion that libllama did not catch itself
    }
    if (written > 0) return written;
    if (!recorder.abort_text().empty()) throw Error(KVF_ERR_LLAMA, recorder.abort_text());
    check_room(state_bytes(sequence, extent), bytes);
    throw Error(KVF_ERR_LLAMA, "llama_state_seq_get_data_ext failed");
}

bool LlamaContext::read_state(int32_t sequence, const StateView &view, Recorder &recorder) const {
    try {
        Recording recording(recorder);
        return api_.state_seq_set_data(context_, view.data, view.bytes, sequence, 0) == view.bytes;
    } catch (...) {
        if (recorder.abort_text().empty()) throw;
        return false; // an assertion that libllama did not catch itself
    }
}

} // namespace kvf
