// Package llamatest opens a llama_context for the examples and tests of kvferry, which has no bindings of llama.cpp. It
// loads libllama at run time, so that any build of it serves.
package llamatest

/*
#cgo LDFLAGS: -ldl
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// The library's parameters are passed on as it fills them in: their layout differs between releases, and only the first
// fields of the context's are set here. Room for more bytes than any release has is harmless, for such structs are
// returned and passed in memory.
struct model_params { char bytes[512]; };
struct context_params {
    uint32_t n_ctx, n_batch, n_ubatch, n_seq_max;
    char rest[1024];
};
struct batch {
    int32_t n_tokens;
    int32_t *token;
    float *embd;
    int32_t *pos, *n_seq_id, **seq_id;
    int8_t *logits;
};

typedef struct functions {
    void (*log_set)(void *, void *);
    void (*load_backends)(const char *);
    struct model_params (*model_default_params)(void);
    void *(*model_load)(const char *, struct model_params);
    void (*model_free)(void *);
    const void *(*model_get_vocab)(const void *);
    int32_t (*vocab_n_tokens)(const void *);
    struct context_params (*context_default_params)(void);
    void *(*context_new)(void *, struct context_params);
    void (*context_free)(void *);
    void (*set_n_threads)(void *, int32_t, int32_t);
    void *(*get_memory)(const void *);
    int32_t (*pos_max)(void *, int32_t);
    struct batch (*batch_init)(int32_t, int32_t, int32_t);
    void (*batch_free)(struct batch);
    int32_t (*decode)(void *, struct batch);
    float *(*get_logits)(void *, int32_t);
} functions;

static void no_log(int level, const char *text, void *user_data) { (void)level, (void)text, (void)user_data; }

static int find(void *library, const char *name, void *function) {
    void *found = dlsym(library, name);
    memcpy(function, &found, sizeof found);
    return found != NULL;
}

// Returns NULL, or what is wrong.
static const char *load(const char *folder, functions *f) {
    char path[4096];
    snprintf(path, sizeof path, "%s/libllama.so", folder);
    void *library = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
    if (!library) return dlerror();
    if (!find(library, "llama_log_set", &f->log_set) ||
        !find(library, "llama_model_default_params", &f->model_default_params) ||
        !find(library, "llama_model_load_from_file", &f->model_load) ||
        !find(library, "llama_model_free", &f->model_free) ||
        !find(library, "llama_model_get_vocab", &f->model_get_vocab) ||
        !find(library, "llama_vocab_n_tokens", &f->vocab_n_tokens) ||
        !find(library, "llama_context_default_params", &f->context_default_params) ||
        !find(library, "llama_init_from_model", &f->context_new) ||
        !find(library, "llama_free", &f->context_free) ||
        !find(library, "llama_set_n_threads", &f->set_n_threads) ||
        !find(library, "llama_get_memory", &f->get_memory) ||
        !find(library, "llama_memory_seq_pos_max", &f->pos_max) ||
        !find(library, "llama_batch_init", &f->batch_init) ||
        !find(library, "llama_batch_free", &f->batch_free) ||
        !find(library, "llama_decode", &f->decode) ||
        !find(library, "llama_get_logits_ith", &f->get_logits))
        return "a function is missing";
    f->log_set((void *)no_log, NULL);
    // Some builds keep the CPU backend in a library beside libllama.
    if (find(library, "ggml_backend_load_all_from_path", &f->load_backends)) f->load_backends(folder);
    return NULL;
}

static void *open_model(const functions *f, const char *path) { return f->model_load(path, f->model_default_params()); }
static void free_model(const functions *f, void *model) { f->model_free(model); }
static int32_t vocabulary(const functions *f, void *model) { return f->vocab_n_tokens(f->model_get_vocab(model)); }

static void *new_context(const functions *f, void *model, uint32_t sequences, uint32_t tokens) {
    struct context_params params = f->context_default_params();
    params.n_ctx = sequences * tokens;
    params.n_batch = params.n_ubatch = tokens;
    params.n_seq_max = sequences;
    void *context = f->context_new(model, params);
    if (context) f->set_n_threads(context, 1, 1);
    return context;
}
static void free_context(const functions *f, void *context) { f->context_free(context); }

// Appends tokens to a sequence. Returns the logits after the last one, or NULL.
static const float *decode(const functions *f, void *context, int32_t sequence, const int32_t *tokens, int32_t count) {
    const int32_t first = f->pos_max(f->get_memory(context), sequence) + 1;
    struct batch batch = f->batch_init(count, 0, 1);
    batch.n_tokens = count;
    for (int32_t i = 0; i < count; ++i) {
        batch.token[i] = tokens[i];
        batch.pos[i] = first + i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = sequence;
        batch.logits[i] = i == count - 1;
    }
    const int32_t status = f->decode(context, batch);
    f->batch_free(batch);
    return status == 0 ? f->get_logits(context, -1) : NULL;
}
*/
import "C"

import (
	"errors"
	"fmt"
	"sync"
	"unsafe"
)

// TokensPerSequence is how many tokens a sequence has room for.
const TokensPerSequence = 256

// Context is a llama_context of its own model.
type Context struct {
	// Address of the llama_context.
	Address uintptr
	// Lock is held around everything that is done with the llama_context. Decode takes it.
	Lock sync.Mutex

	functions      C.functions
	model, context unsafe.Pointer
	vocabulary     int
}

// Open loads libllama from a folder and makes a context with a number of sequences. Close frees it.
func Open(folder, model string, sequences int) (*Context, error) {
	c := &Context{}
	inFolder, path := C.CString(folder), C.CString(model)
	defer C.free(unsafe.Pointer(inFolder))
	defer C.free(unsafe.Pointer(path))
	if wrong := C.load(inFolder, &c.functions); wrong != nil {
		return nil, fmt.Errorf("libllama in %s: %s", folder, C.GoString(wrong))
	}
	if c.model = C.open_model(&c.functions, path); c.model == nil {
		return nil, fmt.Errorf("libllama cannot load %s", model)
	}
	c.vocabulary = int(C.vocabulary(&c.functions, c.model))
	c.context = C.new_context(&c.functions, c.model, C.uint32_t(sequences), TokensPerSequence)
	if c.context == nil {
		C.free_model(&c.functions, c.model)
		return nil, errors.New("libllama cannot make a context")
	}
	c.Address = uintptr(c.context)
	return c, nil
}

// Close frees the context and its model.
func (c *Context) Close() {
	C.free_context(&c.functions, c.context)
	C.free_model(&c.functions, c.model)
}

// Decode appends tokens to a sequence, and returns the most likely next token. It panics where llama_decode fails.
func (c *Context) Decode(sequence int32, tokens ...int32) (next int32) {
	c.Lock.Lock()
	defer c.Lock.Unlock()
	first := C.decode(&c.functions, c.context, C.int32_t(sequence), (*C.int32_t)(&tokens[0]), C.int32_t(len(tokens)))
	if first == nil {
		panic("llamatest: llama_decode failed")
	}
	logits := unsafe.Slice((*float32)(first), c.vocabulary)
	for token, logit := range logits {
		if logit > logits[next] {
			next = int32(token)
		}
	}
	return next
}
