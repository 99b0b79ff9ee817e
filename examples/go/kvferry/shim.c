#include "shim.h"

int32_t kvgo_submit(kvgo_submission *s, const kvf_region *regions, kvf_block *blocks) {
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.priority = s->priority;
    options.queue = s->queue;
    options.user_data = s->token;
    options.mode = s->mode;
    options.flags = s->flags;
    options.stream = s->stream;
    options.error = s->error;
    options.error_size = sizeof s->error;
    kvf_job *job = s->wants_job ? &s->job : 0;
    void *buffer = (void *)(uintptr_t)s->buffer;
    switch (s->operation) {
    case KVGO_SAVE_REGIONS:
        return kvf_regions_save(s->owner, regions, s->count, buffer, s->bytes, &options, job);
    case KVGO_LOAD_REGIONS:
        return kvf_regions_load(s->owner, regions, s->count, buffer, s->bytes, &options, job);
    case KVGO_SAVE_SEQUENCE:
        return kvf_llama_save(s->owner, s->sequence, buffer, s->bytes, &options, job);
    case KVGO_LOAD_SEQUENCE:
        return kvf_llama_load(s->owner, s->sequence, buffer, s->bytes, &options, job);
    case KVGO_SAVE_BLOCKS:
        return kvf_llama_save_blocks(s->owner, s->sequence, blocks, sizeof *blocks,
                                     (uint32_t)s->count, &options, job);
    case KVGO_LOAD_BLOCKS:
        return kvf_llama_load_blocks(s->owner, s->sequence, blocks, sizeof *blocks,
                                     (uint32_t)s->count, buffer, s->bytes, &options, job);
    case KVGO_SAVE_CHECKPOINT:
        return kvf_llama_save_checkpoint(s->owner, s->sequence, buffer, s->bytes, &options, job);
    }
    return KVF_ERR_INVALID_ARGUMENT;
}

void kvgo_release(const uint64_t *jobs, uint32_t count) {
    for (uint32_t i = 0; i < count; ++i) kvf_job_release(jobs[i]);
}

int32_t kvgo_attach(uint64_t engine, uintptr_t context, uint32_t flags, const char *library,
                    char *error, uint64_t error_size, uint64_t *llama) {
    kvf_llama_options options = KVF_LLAMA_OPTIONS_INIT;
    options.flags = flags;
    options.library = library;
    options.error = error;
    options.error_size = error_size;
    return kvf_llama_attach(engine, (struct llama_context *)context, &options, llama);
}

int32_t kvgo_state_cut(const void *state, uint64_t bytes, kvf_block *blocks, uint32_t count,
                       void *checkpoint, uint64_t *checkpoint_bytes, uint32_t parts, char *error,
                       uint64_t error_size) {
    kvf_state_options options = KVF_STATE_OPTIONS_INIT;
    options.parts_in_blocks = parts;
    options.error = error;
    options.error_size = error_size;
    return kvf_state_cut(state, bytes, blocks, sizeof *blocks, count, checkpoint, checkpoint_bytes,
                         &options);
}

int32_t kvgo_state_join(const kvf_block *blocks, uint32_t count, const void *checkpoint,
                        uint64_t checkpoint_bytes, void *state, uint64_t *state_bytes,
                        uint32_t parts, char *error, uint64_t error_size) {
    kvf_state_options options = KVF_STATE_OPTIONS_INIT;
    options.parts_in_blocks = parts;
    options.error = error;
    options.error_size = error_size;
    return kvf_state_join(blocks, sizeof *blocks, count, checkpoint, checkpoint_bytes, state,
                          state_bytes, &options);
}
