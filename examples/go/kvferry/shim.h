// Go submits a job by one call of C, with one flat struct of numbers. The struct holds no pointer,
// so that Go's runtime has nothing to check. Go has pinned the memory that its addresses name.
#pragma once

#include <kvferry.h>

enum {
    KVGO_SAVE_REGIONS,
    KVGO_LOAD_REGIONS,
    KVGO_SAVE_SEQUENCE,
    KVGO_LOAD_SEQUENCE,
    KVGO_SAVE_BLOCKS,
    KVGO_LOAD_BLOCKS,
    KVGO_SAVE_CHECKPOINT
};

typedef struct kvgo_submission {
    uint64_t owner; // a kvf_engine for regions, a kvf_llama for a sequence
    uint64_t queue;
    uint64_t token;  // the completion's user_data
    uint64_t buffer; // of KVGO_LOAD_BLOCKS: the checkpoint
    uint64_t bytes;
    uint64_t count; // regions or blocks
    uint64_t stream;
    uint64_t job; // out, if wants_job
    int32_t sequence;
    uint32_t operation;
    uint32_t priority;
    uint32_t mode;
    uint32_t flags;
    uint32_t wants_job;
    char error[256]; // out, where the submission is refused
} kvgo_submission;

int32_t kvgo_submit(kvgo_submission *s, const kvf_region *regions, kvf_block *blocks);
void kvgo_release(const uint64_t *jobs, uint32_t count);
int32_t kvgo_attach(uint64_t engine, uintptr_t context, uint32_t flags, const char *library,
                    char *error, uint64_t error_size, uint64_t *llama);
int32_t kvgo_state_cut(const void *state, uint64_t bytes, kvf_block *blocks, uint32_t count,
                       void *checkpoint, uint64_t *checkpoint_bytes, uint32_t parts, char *error,
                       uint64_t error_size);
int32_t kvgo_state_join(const kvf_block *blocks, uint32_t count, const void *checkpoint,
                        uint64_t checkpoint_bytes, void *state, uint64_t *state_bytes,
                        uint32_t parts, char *error, uint64_t error_size);
