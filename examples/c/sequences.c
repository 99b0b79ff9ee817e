/* Saves a sequence while another one is decoded, loads it into a third one, and decodes that.
 *
 *     sequences MODEL.gguf FOLDER-OF-LIBLLAMA
 *
 * The sequence is saved twice. The program learns that the first save is complete from poll(2), as
 * a program with an event loop does, and the second one calls a function. At the end llama.cpp's
 * own calls save and load the same sequence, and the program compares the states and the logits.
 *
 * All calls of llama.cpp and of kvf_llama_* are made by one thread: the one that runs main(). */
#include <ggml-backend.h>
#include <kvferry.h>
#include <llama.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { PROMPT_TOKENS = 512, SAVED = 0, DECODED = 1, LOADED = 2, SEQUENCES = 3 };

static void fail(const char *what, const char *why) {
    fprintf(stderr, "%s: %s\n", what, why);
    exit(1);
}

static void check(int32_t status, const char *what) {
    if (status < 0) fail(what, kvf_strerror(status));
}

/* ---- llama.cpp ------------------------------------------------------------------------------- */

static struct llama_model *model;
static struct llama_context *context;
static int32_t vocabulary;
static llama_pos next_position[SEQUENCES];

/* Appends `count` tokens to a sequence, and computes the logits of the last one. */
static void decode(llama_seq_id sequence, int32_t count) {
    struct llama_batch batch = llama_batch_init(count, 0, 1);
    for (int32_t i = 0; i < count; ++i) {
        const llama_pos position = next_position[sequence]++;
        batch.token[i] = (position * 7 + 1) % vocabulary; /* any text will do */
        batch.pos[i] = position;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = sequence;
        batch.logits[i] = i == count - 1;
    }
    batch.n_tokens = count;
    if (llama_decode(context, batch) != 0) fail("llama_decode", "failed");
    llama_batch_free(batch);
}

static void no_log(enum ggml_log_level level, const char *text, void *user_data) {
    (void)user_data;
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

static void open_model(const char *model_file, const char *folder) {
    llama_log_set(no_log, NULL);
    ggml_backend_load_all_from_path(folder);
    model = llama_model_load_from_file(model_file, llama_model_default_params());
    if (!model) fail(model_file, "llama.cpp cannot load this model");
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = 4 * PROMPT_TOKENS;
    params.n_batch = PROMPT_TOKENS;
    params.n_seq_max = SEQUENCES;
    params.kv_unified = true;
    /* llama.cpp's threads spin while they wait for each other, so leave processors
     * for kvferry's. */
    const long processors = sysconf(_SC_NPROCESSORS_ONLN);
    params.n_threads = params.n_threads_batch = processors > 2 ? (int32_t)processors / 2 : 1;
    context = llama_init_from_model(model, params);
    if (!context) fail("llama_init_from_model", "failed");
    vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
}

/* ---- kvferry --------------------------------------------------------------------------------- */

static void report(const kvf_completion *done, const char *how, int steps) {
    check(done->status, done->detail[0] ? done->detail : how);
    printf("%s: %.1f MiB in %.2f ms, %d decode steps of another sequence meanwhile\n", how,
           (double)done->bytes / (1 << 20), (double)(done->finished_ns - done->submitted_ns) / 1e6,
           steps);
}

/* With a queue: its descriptor becomes readable when a job has completed, however many jobs there
 * are. A program waits for it together with its other descriptors. */
static void save_with_poll(kvf_llama llama, void *state, uint64_t bytes) {
    kvf_queue queue;
    check(kvf_queue_create(&queue), "kvf_queue_create");
    kvf_submit_options submit = KVF_SUBMIT_OPTIONS_INIT;
    submit.queue = queue;
    check(kvf_llama_save(llama, SAVED, state, bytes, &submit, NULL), "kvf_llama_save");

    struct pollfd completions = {kvf_queue_fd(queue), POLLIN, 0};
    int steps = 0;
    while (poll(&completions, 1, 0) == 0) {
        decode(DECODED, 1);
        ++steps;
    }
    kvf_completion done;
    check(kvf_queue_take(queue, &done, sizeof done, 1, 0), "kvf_queue_take");
    report(&done, "save, poll", steps);
    check(kvf_queue_destroy(queue), "kvf_queue_destroy");
}

/* With a callback: a thread of the engine calls it, and the next completion waits until it returns.
 * So it should only pass the completion on to a thread of yours. */
static kvf_completion called_with;
static atomic_bool called;

static void on_completion(const kvf_completion *completion) {
    called_with = *completion;
    atomic_store(&called, true);
}

static void save_with_callback(kvf_llama llama, void *state, uint64_t bytes) {
    kvf_submit_options submit = KVF_SUBMIT_OPTIONS_INIT;
    submit.callback = on_completion;
    check(kvf_llama_save(llama, SAVED, state, bytes, &submit, NULL), "kvf_llama_save");
    int steps = 0;
    while (!atomic_load(&called)) {
        decode(DECODED, 1);
        ++steps;
    }
    report(&called_with, "save, callback", steps);
}

/* A sequence must not be decoded before its load is complete. Here the program waits for
 * the job. */
static void load(kvf_llama llama, const void *state, uint64_t bytes) {
    kvf_submit_options submit = KVF_SUBMIT_OPTIONS_INIT;
    submit.priority = KVF_PRIORITY_URGENT;
    kvf_job job;
    kvf_completion done;
    check(kvf_llama_load(llama, LOADED, state, bytes, &submit, &job), "kvf_llama_load");
    check(kvf_job_wait(job, KVF_FOREVER, &done, sizeof done), "kvf_job_wait");
    check(kvf_job_release(job), "kvf_job_release");
    report(&done, "load", 0);
}

/* ---- Comparing with llama.cpp's own calls ---------------------------------------------------- */

/* Decodes the next token of the loaded sequence, and empties the sequence. Returns a copy of the
 * token's logits, which the caller frees. */
static float *logits_after_load(void) {
    next_position[LOADED] = PROMPT_TOKENS;
    decode(LOADED, 1);
    const size_t bytes = sizeof(float) * (size_t)vocabulary;
    float *logits = malloc(bytes);
    if (!logits) fail("malloc", "out of memory");
    memcpy(logits, llama_get_logits_ith(context, -1), bytes);
    llama_memory_seq_rm(llama_get_memory(context), LOADED, -1, -1);
    return logits;
}

static void compare(const char *what, const void *ours, const void *theirs, size_t bytes) {
    if (memcmp(ours, theirs, bytes) != 0) fail(what, "differ from llama.cpp's");
    printf("%s: equal to llama.cpp's, byte for byte\n", what);
}

int main(int count, char **arguments) {
    if (count != 3) fail("usage", "sequences MODEL.gguf FOLDER-OF-LIBLLAMA");
    open_model(arguments[1], arguments[2]);
    decode(SAVED, PROMPT_TOKENS);
    decode(DECODED, 8);

    kvf_engine engine;
    check(kvf_engine_create(NULL, &engine), "kvf_engine_create");
    char error[256] = "";
    kvf_llama_options options = KVF_LLAMA_OPTIONS_INIT;
    options.error = error;
    options.error_size = sizeof error;
    kvf_llama llama;
    if (kvf_llama_attach(engine, context, &options, &llama) < 0) fail("kvf_llama_attach", error);

    uint64_t bytes; /* of the state; this call moves none of them */
    check(kvf_llama_size(llama, SAVED, &bytes), "kvf_llama_size");
    void *polled, *called_back;
    check(kvf_buffer_alloc(engine, bytes, &polled), "kvf_buffer_alloc");
    check(kvf_buffer_alloc(engine, bytes, &called_back), "kvf_buffer_alloc");
    save_with_poll(llama, polled, bytes);
    save_with_callback(llama, called_back, bytes);

    uint8_t *theirs = malloc(bytes);
    if (!theirs || llama_state_seq_get_data(context, theirs, bytes, SAVED) != bytes) {
        fail("llama_state_seq_get_data", "failed");
    }
    compare("state saved with poll", polled, theirs, bytes);
    compare("state saved with a callback", called_back, theirs, bytes);

    if (llama_state_seq_set_data(context, theirs, bytes, LOADED) != bytes) {
        fail("llama_state_seq_set_data", "failed");
    }
    float *their_logits = logits_after_load();
    load(llama, polled, bytes);
    float *our_logits = logits_after_load();
    compare("logits after the load", our_logits, their_logits, sizeof(float) * (size_t)vocabulary);

    free(our_logits);
    free(their_logits);
    free(theirs);
    /* Detach before the context is freed and the engine is destroyed. */
    check(kvf_llama_detach(llama), "kvf_llama_detach");
    check(kvf_buffer_free(polled), "kvf_buffer_free");
    check(kvf_buffer_free(called_back), "kvf_buffer_free");
    check(kvf_engine_destroy(engine), "kvf_engine_destroy");
    llama_free(context);
    llama_model_free(model);
    return 0;
}
