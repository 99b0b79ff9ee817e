/* KVF_SUBMIT_EACH_BLOCK is for saves of blocks alone, and needs a queue or a callback. */
#include "check.h"

static char error[128];
static char byte, to;

/* No attachment is needed: options are looked at first. */
static const kvf_llama none = 0;

static void note(const kvf_completion *completion) { (void)completion; }

static int32_t save_blocks(kvf_queue queue, kvf_completion_callback callback) {
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.flags = KVF_SUBMIT_EACH_BLOCK;
    options.queue = queue;
    options.callback = callback;
    options.error = error;
    options.error_size = sizeof error;
    kvf_block block = {&to, 1, 0, 1};
    kvf_job job;
    return kvf_llama_save_blocks(none, 0, &block, sizeof block, 1, &options, &job);
}

int main(void) {
    kvf_queue queue;
    CHECK_OK(kvf_queue_create(&queue));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, save_blocks(0, NULL));
    CHECK(strstr(error, "no queue and no callback"));
    CHECK_STATUS(KVF_ERR_INVALID_HANDLE, save_blocks(queue, NULL));
    CHECK_STATUS(KVF_ERR_INVALID_HANDLE, save_blocks(0, note));

    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.flags = KVF_SUBMIT_EACH_BLOCK;
    options.queue = queue;
    const kvf_block block = {&byte, 1, 0, 1};
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_llama_save(none, 0, &to, 1, &options, NULL));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT,
                 kvf_llama_save_checkpoint(none, 0, &to, 1, &options, NULL));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_llama_load(none, 0, &byte, 1, &options, NULL));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT,
                 kvf_llama_load_blocks(none, 0, &block, sizeof block, 1, NULL, 0, &options, NULL));
    const kvf_engine engine = make_engine();
    const kvf_region region = plain_region(&byte, 1, 0);
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT,
                 kvf_regions_save(engine, &region, 1, &to, 1, &options, NULL));
    CHECK_OK(kvf_engine_destroy(engine));
    CHECK_OK(kvf_queue_destroy(queue));
    return 0;
}
