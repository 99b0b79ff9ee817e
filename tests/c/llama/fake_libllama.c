/* A libllama that does as little as kvferry needs, for what no real one can be made to do. Its one
 * context keeps plain attention; what it holds and says is set by the test. */
#include "fake_libllama.h"

#include <stdlib.h>
#include <string.h>

#define EXPORTED __attribute__((visibility("default")))

EXPORTED struct fake_llama fake_llama = {.last_position = -1, .last_of_others = {-1, -1, -1}};

static char model[8], memory[8];

/* ---- ggml ---- */

EXPORTED void *ggml_get_data(const void *tensor) { return (void *)(size_t)tensor; }
EXPORTED void ggml_backend_tensor_get(const void *tensor, void *data, size_t offset, size_t bytes) {
    memcpy(data, (const char *)tensor + offset, bytes);
}
EXPORTED void ggml_backend_tensor_set(void *tensor, const void *data, size_t offset, size_t bytes) {
    memcpy((char *)tensor + offset, data, bytes);
}
EXPORTED void ggml_backend_buffer_free(void *buffer) { (void)buffer; }
EXPORTED void *ggml_backend_buffer_get_base(void *buffer) { return buffer; }
EXPORTED size_t ggml_backend_buffer_get_size(void *buffer) {
    (void)buffer;
    return 0;
}
EXPORTED void ggml_backend_buffer_clear(void *buffer, uint8_t value) {
    (void)buffer;
    (void)value;
}
EXPORTED void ggml_backend_tensor_copy(const void *source, void *target) {
    (void)source;
    (void)target;
}
EXPORTED int ggml_backend_sched_graph_compute_async(void *scheduler, void *graph) {
    (void)scheduler;
    (void)graph;
    return 0;
}
EXPORTED int ggml_graph_n_nodes(void *graph) {
    (void)graph;
    return 0;
}
EXPORTED void *ggml_graph_node(void *graph, int number) {
    (void)number;
    return graph;
}
EXPORTED void *ggml_graph_get_tensor(const void *graph, const char *name) {
    (void)graph;
    (void)name;
    return NULL;
}
EXPORTED size_t ggml_nbytes(const void *tensor) {
    (void)tensor;
    return 0;
}
EXPORTED const char *ggml_op_desc(const void *tensor) {
    (void)tensor;
    return "NONE";
}
EXPORTED void ggml_abort(const char *file, int line, const char *format, ...) {
    (void)file;
    (void)line;
    (void)format;
    abort();
}

/* ---- llama ---- */

static int32_t *last_of(int32_t sequence) {
    return sequence ? &fake_llama.last_of_others[sequence - 1] : &fake_llama.last_position;
}

/* Calls what kvferry watches, so that there are relocation slots for it. */
EXPORTED int llama_decode(void *context, void *buffer) {
    (void)context;
    if (!buffer) return ggml_backend_sched_graph_compute_async(NULL, NULL);
    ggml_backend_tensor_get(buffer, buffer, 0, 0);
    ggml_backend_tensor_set(buffer, buffer, 0, 0);
    ggml_backend_tensor_copy(buffer, buffer);
    ggml_backend_buffer_clear(buffer, 0);
    ggml_backend_buffer_free(buffer);
    ggml_abort("", 0, "");
    return 0;
}

EXPORTED const void *llama_get_model(const void *context) {
    (void)context;
    return model;
}
EXPORTED void *llama_get_memory(const void *context) {
    (void)context;
    return memory;
}

EXPORTED size_t llama_state_seq_get_size_ext(void *context, int32_t sequence, uint32_t flags) {
    (void)context;
    (void)flags;
    if (*last_of(sequence) >= 0 && fake_llama.claimed_bytes) return fake_llama.claimed_bytes;
    if (*last_of(sequence) >= 0 && fake_llama.state.bytes) return fake_llama.state.bytes;
    return fake_llama.shares_cells ? 8 : 16;
}

/* Where the tensor of this number is. A tensor's address is that of its data. */
static char *tensor_of(int number) {
    const struct fake_tensor *const tensors = fake_llama.state.tensors;
    if (!fake_llama.memory) return (char *)(fake_llama.state.data + tensors[number].offset);
    return fake_llama.memory + (number ? tensors[0].bytes : 0);
}

static size_t write_cells(const struct fake_state *state, uint8_t *buffer, size_t bytes) {
    if (bytes < state->bytes) return 0;
    size_t at = 0;
    for (int number = 0; number < 2; ++number) {
        const struct fake_tensor *const tensor = &state->tensors[number];
        memcpy(buffer + at, state->data + at, tensor->offset - at);
        ggml_backend_tensor_get(tensor_of(number), buffer + tensor->offset, 0, tensor->bytes);
        at = tensor->offset + tensor->bytes;
    }
    memcpy(buffer + at, state->data + at, state->bytes - at);
    return state->bytes;
}

/* The magic number and the sequence; then one stream, without cells. */
EXPORTED size_t llama_state_seq_get_data_ext(void *context, uint8_t *buffer, size_t bytes,
                                             int32_t sequence, uint32_t flags) {
    (void)flags;
    const uint32_t words[] = {0xaf143cd8, (uint32_t)sequence, 1, 0};
    const size_t written = fake_llama.shares_cells ? 8 : 16;
    (void)context;
    if (*last_of(sequence) >= 0 && fake_llama.state.bytes)
        return write_cells(&fake_llama.state, buffer, bytes);
    if (bytes < written) return 0;
    memcpy(buffer, words, written);
    return written;
}

static bool go_on(int number) {
    if (fake_llama.on_tensor) fake_llama.on_tensor(number);
    return !fake_llama.refuses_state;
}

EXPORTED size_t llama_state_seq_set_data_ext(void *context, const uint8_t *buffer, size_t bytes,
                                             int32_t sequence, uint32_t flags) {
    (void)context;
    (void)flags;
    *last_of(sequence) = fake_llama.loads_tensors ? (int32_t)fake_llama.state.cells - 1 : 0;
    if (!fake_llama.loads_tensors) return bytes;
    for (int number = 0; number < 2; ++number) {
        const struct fake_tensor *const tensor = &fake_llama.state.tensors[number];
        if (!go_on(number)) return 0;
        ggml_backend_tensor_set(tensor_of(number), buffer + tensor->offset, 0, tensor->bytes);
    }
    return go_on(2) ? bytes : 0;
}

EXPORTED void llama_memory_seq_cp(void *of, int32_t from, int32_t to, int32_t begin, int32_t end) {
    (void)of;
    (void)begin;
    (void)end;
    *last_of(to) = *last_of(from);
}

EXPORTED bool llama_memory_seq_rm(void *of, int32_t sequence, int32_t begin, int32_t end) {
    (void)of;
    (void)begin;
    (void)end;
    if (fake_llama.on_removal) fake_llama.on_removal();
    *last_of(sequence) = -1;
    return true;
}
EXPORTED int32_t llama_memory_seq_pos_min(void *of, int32_t sequence) {
    (void)of;
    return *last_of(sequence) < 0 ? -1 : 0;
}
EXPORTED int32_t llama_memory_seq_pos_max(void *of, int32_t sequence) {
    (void)of;
    return *last_of(sequence);
}

EXPORTED uint32_t llama_n_ctx(const void *context) {
    (void)context;
    return 256;
}
EXPORTED uint32_t llama_n_seq_max(const void *context) {
    (void)context;
    return 1 + fake_llama.more_sequences;
}
EXPORTED int32_t llama_model_desc(const void *of, char *text, size_t bytes) {
    (void)of;
    if (bytes) text[0] = 0;
    return 0;
}
EXPORTED uint64_t llama_model_size(const void *of) {
    (void)of;
    return 1;
}
EXPORTED uint64_t llama_model_n_params(const void *of) {
    (void)of;
    return 1;
}
EXPORTED int32_t llama_model_n_swa(const void *of) {
    (void)of;
    return 0;
}
EXPORTED int32_t llama_model_n_ctx_train(const void *of) {
    (void)of;
    return 256;
}
EXPORTED bool llama_model_is_recurrent(const void *of) {
    (void)of;
    return false;
}
EXPORTED int32_t llama_model_meta_count(const void *of) {
    (void)of;
    return 0;
}
EXPORTED int32_t llama_model_meta_key_by_index(const void *of, int32_t index, char *text,
                                               size_t bytes) {
    (void)of;
    (void)index;
    (void)text;
    (void)bytes;
    return -1;
}
EXPORTED int32_t llama_model_meta_val_str_by_index(const void *of, int32_t index, char *text,
                                                   size_t bytes) {
    (void)of;
    (void)index;
    (void)text;
    (void)bytes;
    return -1;
}
