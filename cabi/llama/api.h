// The functions of libllama and ggml that are used, found in the running process. Their prototypes
// are those of llama.cpp's include/llama.h and ggml's include/ggml.h and ggml-backend.h (b10361);
// the library is neither linked nor needed to build.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

struct llama_context;
struct llama_model;
struct llama_memory_i;
struct ggml_tensor;
struct ggml_cgraph;
struct ggml_backend_buffer;
struct ggml_backend_sched;

namespace kvf {

using llama_memory = llama_memory_i *;

// The parts of ggml, as libllama itself reaches them.
struct GgmlApi {
    void *(*get_data)(const ggml_tensor *) = nullptr;
    void (*tensor_get)(const ggml_tensor *, void *, size_t, size_t) = nullptr;
    void (*tensor_set)(ggml_tensor *, const void *, size_t, size_t) = nullptr;
    void (*buffer_free)(ggml_backend_buffer *) = nullptr;
    void *(*buffer_get_base)(ggml_backend_buffer *) = nullptr;
    size_t (*buffer_get_size)(ggml_backend_buffer *) = nullptr;
    void (*buffer_clear)(ggml_backend_buffer *, uint8_t) = nullptr;
    void (*tensor_copy)(const ggml_tensor *, ggml_tensor *) = nullptr;
    void (*tensor_memset)(ggml_tensor *, uint8_t, size_t, size_t) = nullptr; // NULL in older ones
    int (*graph_compute)(ggml_backend_sched *, ggml_cgraph *) = nullptr;     // asynchronous
    int (*graph_n_nodes)(ggml_cgraph *) = nullptr;
    ggml_tensor *(*graph_node)(ggml_cgraph *, int) = nullptr;
    ggml_tensor *(*graph_get_tensor)(const ggml_cgraph *, const char *) = nullptr; // by its name
    size_t (*nbytes)(const ggml_tensor *) = nullptr;
    const char *(*op_desc)(const ggml_tensor *) = nullptr;
    void (*abort)(const char *, int, const char *, ...) = nullptr;
    const char *(*version)() = nullptr;
    const char *(*commit)() = nullptr;
};

struct LlamaApi {
    std::string path;  // of the library
    uint64_t base = 0; // its load address
    GgmlApi ggml;

    size_t (*state_seq_get_size)(llama_context *, int32_t, uint32_t) = nullptr;
    size_t (*state_seq_get_data)(llama_context *, uint8_t *, size_t, int32_t, uint32_t) = nullptr;
    size_t (*state_seq_set_data)(llama_context *, const uint8_t *, size_t, int32_t,
                                 uint32_t) = nullptr;
    const llama_model *(*get_model)(const llama_context *) = nullptr;
    llama_memory (*get_memory)(const llama_context *) = nullptr;
    bool (*memory_seq_rm)(llama_memory, int32_t, int32_t, int32_t) = nullptr;
    void (*memory_seq_cp)(llama_memory, int32_t, int32_t, int32_t, int32_t) = nullptr;
    int32_t (*memory_seq_pos_min)(llama_memory, int32_t) = nullptr;
    int32_t (*memory_seq_pos_max)(llama_memory, int32_t) = nullptr;
    uint32_t (*n_ctx)(const llama_context *) = nullptr;
    uint32_t (*n_ctx_seq)(const llama_context *) = nullptr; // NULL in older libraries
    uint32_t (*n_seq_max)(const llama_context *) = nullptr;
    int32_t (*model_desc)(const llama_model *, char *, size_t) = nullptr;
    uint64_t (*model_size)(const llama_model *) = nullptr;
    uint64_t (*model_n_params)(const llama_model *) = nullptr;
    int32_t (*model_n_swa)(const llama_model *) = nullptr;
    int32_t (*model_n_ctx_train)(const llama_model *) = nullptr;
    int32_t (*model_meta_count)(const llama_model *) = nullptr;
    int32_t (*model_meta_key_by_index)(const llama_model *, int32_t, char *, size_t) = nullptr;
    int32_t (*model_meta_val_str_by_index)(const llama_model *, int32_t, char *, size_t) = nullptr;
    bool (*model_is_recurrent)(const llama_model *) = nullptr;
    bool (*model_is_hybrid)(const llama_model *) = nullptr; // NULL in older libraries
};

// Finds the libllama that is loaded in this process. `wanted` (may be NULL) is its path or a part
// of its path. The library whose whole path it is comes first. A library that is too old is found
// only if there is no other. Throws KVF_ERR_LIBRARY_NOT_FOUND or _AMBIGUOUS, or KVF_ERR_UNSUPPORTED
// for a version that lacks a function.
LlamaApi find_llama(const char *wanted);

} // namespace kvf
