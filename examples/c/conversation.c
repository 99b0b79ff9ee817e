/* Saves a conversation to a file, and brings it back in another context, of another process.
 *
 *     conversation save MODEL.gguf FOLDER-OF-LIBLLAMA FILE
 *     conversation load MODEL.gguf FOLDER-OF-LIBLLAMA FILE
 *
 * `save` decodes a prompt, writes the state of its sequence to FILE, and prints the token that the
 * model would say next. `load` reads FILE into a new context and prints the same token, without
 * decoding the prompt again.
 *
 * Every call that can fail is looked at. Each function frees on every path what it has taken, in
 * the reverse order. */
#include <errno.h>
#include <ggml-backend.h>
#include <inttypes.h>
#include <kvferry.h>
#include <llama.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PROMPT_TOKENS = 64, SEQUENCE = 0 };

/* Tells on stderr what failed and why. Returns false, so that a function can return the same. */
static bool failed(const char *what, const char *why) {
    fprintf(stderr, "conversation: %s: %s\n", what, why);
    return false;
}

/* The text that a call has written, or else what its status means. */
static const char *reason(const char *error, int32_t status) {
    return error[0] ? error : kvf_strerror(status);
}

/* ---- llama.cpp ------------------------------------------------------------------------------- */

static void no_log(enum ggml_log_level level, const char *text, void *user_data) {
    (void)user_data;
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

/* Decodes tokens of the conversation from `position` on; any text will do. */
static bool decode(struct llama_context *context, llama_pos position, int32_t count) {
    const struct llama_model *model = llama_get_model(context);
    const int32_t vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
    struct llama_batch batch = llama_batch_init(count, 0, 1);
    batch.n_tokens = count;
    for (int32_t i = 0; i < count; ++i) {
        batch.token[i] = ((position + i) * 7 + 1) % vocabulary;
        batch.pos[i] = position + i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = SEQUENCE;
        batch.logits[i] = i == count - 1;
    }
    const bool decoded = llama_decode(context, batch) == 0;
    llama_batch_free(batch);
    return decoded || failed("llama_decode", "it failed");
}

/* Decodes the token after the prompt, and prints the one that the model finds most likely to
 * follow. */
static bool go_on(struct llama_context *context) {
    if (!decode(context, PROMPT_TOKENS, 1)) return false;
    const struct llama_model *model = llama_get_model(context);
    const int32_t vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
    const float *logits = llama_get_logits_ith(context, -1);
    int32_t best = 0;
    for (int32_t token = 1; token < vocabulary; ++token) {
        if (logits[token] > logits[best]) best = token;
    }
    printf("next token: %" PRId32 " (%a)\n", best, (double)logits[best]);
    return true;
}

/* ---- One transfer ---------------------------------------------------------------------------- */

/* Waits for a job and releases its handle. Returns whether the job has ended with success. Without
 * a timeout the wait lasts until the job has ended, so that the buffer may be freed afterwards,
 * whatever this returns. */
static bool finish(kvf_job job, const char *what) {
    kvf_completion done = {.status = KVF_ERR_INTERNAL};
    kvf_job_wait(job, KVF_FOREVER, &done, sizeof done);
    kvf_job_release(job);
    if (done.status == KVF_OK) return true;
    return failed(what, reason(done.detail, done.status));
}

static kvf_submit_options submit_with_error(char *error, uint64_t error_size) {
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.priority = KVF_PRIORITY_URGENT; /* there is nothing else to do meanwhile */
    options.error = error;
    options.error_size = error_size;
    return options;
}

static bool save(kvf_llama llama, void *state, uint64_t bytes) {
    char error[256] = "";
    const kvf_submit_options options = submit_with_error(error, sizeof error);
    kvf_job job;
    const int32_t status = kvf_llama_save(llama, SEQUENCE, state, bytes, &options, &job);
    if (status != KVF_OK) return failed("kvf_llama_save", reason(error, status));
    return finish(job, "the save");
}

static bool load(kvf_llama llama, const void *state, uint64_t bytes) {
    char error[256] = "";
    const kvf_submit_options options = submit_with_error(error, sizeof error);
    kvf_job job;
    /* A damaged file is refused here, and the sequence is as it was. */
    const int32_t status = kvf_llama_load(llama, SEQUENCE, state, bytes, &options, &job);
    if (status != KVF_OK) return failed("kvf_llama_load", reason(error, status));
    if (finish(job, "the load")) return true;
    kvf_llama_settle(llama); /* the sequence is empty from here on, and could be decoded */
    return false;
}

/* ---- The file -------------------------------------------------------------------------------- */

static bool write_file(const char *path, const void *state, uint64_t bytes) {
    FILE *file = fopen(path, "wb");
    if (!file) return failed(path, strerror(errno));
    const bool written = fwrite(state, 1, bytes, file) == bytes;
    /* What has not reached the disk is noticed here at last. */
    if (fclose(file) == 0 && written) return true;
    remove(path); /* half a state is of no use */
    return failed(path, "it could not be written");
}

/* The size of an open file, or -1. Leaves the file at its beginning. */
static long size_of(FILE *file) {
    if (fseek(file, 0, SEEK_END) != 0) return -1;
    const long bytes = ftell(file);
    return fseek(file, 0, SEEK_SET) == 0 ? bytes : -1;
}

/* Returns a buffer with the first `bytes` of the file; free it with kvf_buffer_free(). Returns NULL
 * if that fails. */
static void *read_state(kvf_engine engine, FILE *file, uint64_t bytes) {
    void *state;
    const int32_t status = kvf_buffer_alloc(engine, bytes, &state);
    if (status != KVF_OK) {
        failed("kvf_buffer_alloc", kvf_strerror(status));
        return NULL;
    }
    if (fread(state, 1, bytes, file) == bytes) return state;
    kvf_buffer_free(state);
    return NULL;
}

/* ---- The two ways ---------------------------------------------------------------------------- */

static bool save_to_file(kvf_engine engine, kvf_llama llama, const char *path) {
    uint64_t bytes;
    int32_t status = kvf_llama_size(llama, SEQUENCE, &bytes);
    if (status != KVF_OK) return failed("kvf_llama_size", kvf_strerror(status));
    void *state;
    status = kvf_buffer_alloc(engine, bytes, &state);
    if (status != KVF_OK) return failed("kvf_buffer_alloc", kvf_strerror(status));

    const bool saved = save(llama, state, bytes) && write_file(path, state, bytes);
    kvf_buffer_free(state);
    if (saved) printf("saved %" PRIu64 " bytes\n", bytes);
    return saved;
}

static bool load_from_file(kvf_engine engine, kvf_llama llama, const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) return failed(path, strerror(errno));
    const long bytes = size_of(file);
    void *state = bytes > 0 ? read_state(engine, file, (uint64_t)bytes) : NULL;
    fclose(file);
    if (!state) return failed(path, "no state could be read from it");

    const bool loaded = load(llama, state, (uint64_t)bytes);
    kvf_buffer_free(state);
    if (loaded) printf("loaded %ld bytes\n", bytes);
    return loaded;
}

/* ---- Attaching ------------------------------------------------------------------------------- */

static bool run_attached(kvf_engine engine, struct llama_context *context, bool saving,
                         const char *path) {
    char error[256] = "";
    kvf_llama_options options = KVF_LLAMA_OPTIONS_INIT;
    options.error = error;
    options.error_size = sizeof error;
    kvf_llama llama;
    const int32_t status = kvf_llama_attach(engine, context, &options, &llama);
    if (status != KVF_OK) return failed("kvf_llama_attach", reason(error, status));
    const bool moved = saving
                           ? decode(context, 0, PROMPT_TOKENS) && save_to_file(engine, llama, path)
                           : load_from_file(engine, llama, path);
    kvf_llama_detach(llama); /* waits for a job that is still in flight */
    return moved && go_on(context);
}

static bool run_in_context(struct llama_context *context, bool saving, const char *path) {
    char error[256] = "";
    kvf_engine_options options = KVF_ENGINE_OPTIONS_INIT;
    options.error = error;
    options.error_size = sizeof error;
    kvf_engine engine;
    const int32_t status = kvf_engine_create(&options, &engine);
    if (status != KVF_OK) return failed("kvf_engine_create", reason(error, status));
    const bool done = run_attached(engine, context, saving, path);
    kvf_engine_destroy(engine);
    return done;
}

static bool run_with_model(const char *model_file, bool saving, const char *path) {
    struct llama_model *model =
        llama_model_load_from_file(model_file, llama_model_default_params());
    if (!model) return failed(model_file, "it is no model that llama.cpp can load");
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = 2 * PROMPT_TOKENS;
    params.n_threads = params.n_threads_batch = 1;
    struct llama_context *context = llama_init_from_model(model, params);
    bool done = false;
    if (!context) {
        failed("llama_init_from_model", "it failed");
    } else {
        done = run_in_context(context, saving, path);
        llama_free(context);
    }
    llama_model_free(model);
    return done;
}

int main(int count, char **arguments) {
    const bool saving = count == 5 && strcmp(arguments[1], "save") == 0;
    if (!saving && (count != 5 || strcmp(arguments[1], "load") != 0)) {
        fputs("usage: conversation save|load MODEL.gguf FOLDER-OF-LIBLLAMA FILE\n", stderr);
        return 2;
    }
    llama_log_set(no_log, NULL);
    ggml_backend_load_all_from_path(arguments[3]);
    const bool done = run_with_model(arguments[2], saving, arguments[4]);
    llama_backend_free();
    return done ? EXIT_SUCCESS : EXIT_FAILURE;
}
