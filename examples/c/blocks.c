/* Saves a conversation in blocks as it grows, and loads it from its blocks.
 *
 *     blocks MODEL.gguf FOLDER-OF-LIBLLAMA
 *
 * The prompt is saved in blocks, then a turn is decoded, and only the turn's tokens are saved. At
 * the end the sequence is emptied and loaded from all blocks, and the next token must have the same
 * logits as before.
 *
 * All calls of llama.cpp and of kvf_llama_* are made by one thread: the one that runs main(). */
#include <ggml-backend.h>
#include <inttypes.h>
#include <kvferry.h>
#include <llama.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCK_TOKENS = 256, PROMPT_TOKENS = 512, TURN_TOKENS = 300, MOST_BLOCKS = 8, SEQUENCE = 0 };

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

/* Appends `count` tokens to the sequence, from `position` on; any text will do. */
static void decode(llama_pos position, int32_t count) {
    struct llama_batch batch = llama_batch_init(count, 0, 1);
    for (int32_t i = 0; i < count; ++i) {
        batch.token[i] = ((position + i) * 7 + 1) % vocabulary;
        batch.pos[i] = position + i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = SEQUENCE;
        batch.logits[i] = i == count - 1;
    }
    batch.n_tokens = count;
    if (llama_decode(context, batch) != 0) fail("llama_decode", "failed");
    llama_batch_free(batch);
}

/* Decodes the token after the conversation. Returns a copy of its logits, which the caller frees.
 */
static float *next_logits(void) {
    decode(PROMPT_TOKENS + TURN_TOKENS, 1);
    const size_t bytes = sizeof(float) * (size_t)vocabulary;
    float *logits = malloc(bytes);
    if (!logits) fail("malloc", "out of memory");
    memcpy(logits, llama_get_logits_ith(context, -1), bytes);
    return logits;
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
    params.n_ctx = 2 * (PROMPT_TOKENS + TURN_TOKENS);
    params.n_batch = PROMPT_TOKENS;
    /* One sequence id more than there are conversations: a save of blocks borrows that id, so that
     * libllama lists the new cells alone. */
    params.n_seq_max = 2;
    params.kv_unified = true;
    params.n_threads = params.n_threads_batch = 2;
    context = llama_init_from_model(model, params);
    if (!context) fail("llama_init_from_model", "failed");
    vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
}

/* ---- kvferry --------------------------------------------------------------------------------- */

static kvf_engine engine;
static kvf_llama llama;

static void wait_for(kvf_job job, const char *what) {
    kvf_completion done;
    check(kvf_job_wait(job, KVF_FOREVER, &done, sizeof done), "kvf_job_wait");
    check(kvf_job_release(job), "kvf_job_release");
    check(done.status, done.detail[0] ? done.detail : what);
    printf("%s: %.1f MiB in %.2f ms\n", what, (double)done.bytes / (1 << 20),
           (double)(done.finished_ns - done.submitted_ns) / 1e6);
}

/* Saves the positions [begin, end) into buffers of the pool, one for each block. The tail that
 * fills no block is a shorter block. Returns how many blocks there are. */
static uint32_t save_blocks(int32_t begin, int32_t end, kvf_block *blocks) {
    uint32_t count = 0;
    for (int32_t at = begin; at < end; at += BLOCK_TOKENS) {
        kvf_block *block = &blocks[count++];
        block->begin = at;
        block->end = end - at < BLOCK_TOKENS ? end : at + BLOCK_TOKENS;
        const uint32_t tokens = (uint32_t)(block->end - block->begin);
        check(kvf_llama_block_size(llama, tokens, &block->bytes), "kvf_llama_block_size");
        check(kvf_buffer_alloc(engine, block->bytes, &block->buffer), "kvf_buffer_alloc");
    }
    kvf_job job;
    check(kvf_llama_save_blocks(llama, SEQUENCE, blocks, sizeof *blocks, count, NULL, &job),
          "kvf_llama_save_blocks");
    /* Here llama_decode() may go on, with this sequence too. */
    wait_for(job, "save of blocks");
    return count;
}

/* Saves the sliding windows and recurrent layers as they are now, into a buffer of the pool. */
static void *save_checkpoint(uint64_t *bytes) {
    void *checkpoint;
    kvf_job job;
    check(kvf_llama_checkpoint_size(llama, SEQUENCE, bytes), "kvf_llama_checkpoint_size");
    check(kvf_buffer_alloc(engine, *bytes, &checkpoint), "kvf_buffer_alloc");
    check(kvf_llama_save_checkpoint(llama, SEQUENCE, checkpoint, *bytes, NULL, &job),
          "kvf_llama_save_checkpoint");
    wait_for(job, "save of a checkpoint");
    return checkpoint;
}

static void load_blocks(const kvf_block *blocks, uint32_t count, const void *checkpoint,
                        uint64_t checkpoint_bytes) {
    kvf_submit_options submit = KVF_SUBMIT_OPTIONS_INIT;
    submit.priority = KVF_PRIORITY_URGENT;
    char error[256] = "";
    submit.error = error;
    submit.error_size = sizeof error;
    kvf_job job;
    if (kvf_llama_load_blocks(llama, SEQUENCE, blocks, sizeof *blocks, count, checkpoint,
                              checkpoint_bytes, &submit, &job) < 0) {
        fail("kvf_llama_load_blocks", error); /* the sequence is as it was */
    }
    wait_for(job, "load of all blocks");
}

int main(int count, char **arguments) {
    if (count != 3) fail("usage", "blocks MODEL.gguf FOLDER-OF-LIBLLAMA");
    open_model(arguments[1], arguments[2]);
    check(kvf_engine_create(NULL, &engine), "kvf_engine_create");
    check(kvf_llama_attach(engine, context, NULL, &llama), "kvf_llama_attach");

    decode(0, PROMPT_TOKENS);
    char reason[128];
    const int32_t allowed = kvf_llama_blocks_allowed(llama, reason, sizeof reason);
    check(allowed, "kvf_llama_blocks_allowed");
    if (allowed != KVF_BLOCKS_ALONE && allowed != KVF_BLOCKS_WITH_CHECKPOINTS) {
        fail("this cache allows no blocks", reason);
    }
    kvf_block blocks[MOST_BLOCKS];
    uint32_t saved = save_blocks(0, PROMPT_TOKENS, blocks);

    decode(PROMPT_TOKENS, TURN_TOKENS);
    saved += save_blocks(PROMPT_TOKENS, PROMPT_TOKENS + TURN_TOKENS, blocks + saved);
    void *checkpoint = NULL;
    uint64_t checkpoint_bytes = 0;
    if (allowed == KVF_BLOCKS_WITH_CHECKPOINTS) checkpoint = save_checkpoint(&checkpoint_bytes);

    float *before = next_logits();
    check(kvf_llama_remove(llama, SEQUENCE), "kvf_llama_remove");
    load_blocks(blocks, saved, checkpoint, checkpoint_bytes);
    float *after = next_logits();
    if (memcmp(before, after, sizeof(float) * (size_t)vocabulary) != 0) {
        fail("logits after the load", "differ from those before");
    }
    printf("%" PRIu32 " blocks: the same logits as before\n", saved);

    free(before);
    free(after);
    /* Detach before the context is freed and the engine is destroyed. */
    check(kvf_llama_detach(llama), "kvf_llama_detach");
    for (uint32_t i = 0; i < saved; ++i)
        check(kvf_buffer_free(blocks[i].buffer), "kvf_buffer_free");
    check(kvf_buffer_free(checkpoint), "kvf_buffer_free");
    check(kvf_engine_destroy(engine), "kvf_engine_destroy");
    llama_free(context);
    llama_model_free(model);
    return 0;
}
