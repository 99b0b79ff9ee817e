/* Handles that are zero, made up, of another type or of a destroyed object are answered, not
 * followed. */
#include "check.h"

static void check_engine_refused(kvf_engine engine, int32_t status) {
    char byte = 0, json[16];
    void *buffer = &byte;
    uint64_t needed = 7;
    kvf_job job = 7;
    kvf_llama llama = 7;
    const kvf_region region = plain_region(&byte, 1, 0);
    CHECK_STATUS(status, kvf_engine_describe(engine, json, sizeof json, &needed));
    CHECK_STATUS(status, kvf_engine_cancel(engine));
    CHECK_STATUS(status, kvf_engine_destroy(engine));
    CHECK_STATUS(status, kvf_engine_trace(engine, NULL, sizeof(kvf_trace_event), 0));
    CHECK_STATUS(status, kvf_buffer_alloc(engine, 1, &buffer));
    CHECK_STATUS(status, kvf_buffer_register(engine, &byte, 1));
    CHECK_STATUS(status, kvf_buffer_unregister(engine, &byte));
    CHECK_STATUS(status, kvf_buffer_trim(engine));
    CHECK_STATUS(status, kvf_regions_save(engine, &region, 1, &byte, 1, NULL, &job));
    CHECK_STATUS(status, kvf_regions_load(engine, &region, 1, &byte, 1, NULL, &job));
    CHECK_STATUS(status,
                 kvf_llama_attach(engine, (struct llama_context *)(void *)&byte, NULL, &llama));
    /* Nothing was written where the results would have gone. */
    CHECK(job == 7 && llama == 7 && needed == 7 && buffer == &byte);
}

static void check_queue_refused(kvf_queue queue) {
    kvf_completion completion;
    CHECK_STATUS(KVF_ERR_INVALID_HANDLE, kvf_queue_fd(queue));
    CHECK_STATUS(KVF_ERR_INVALID_HANDLE,
                 kvf_queue_take(queue, &completion, sizeof completion, 1, 0));
    CHECK_STATUS(KVF_ERR_INVALID_HANDLE, kvf_queue_wake(queue));
    CHECK_STATUS(KVF_ERR_INVALID_HANDLE, kvf_queue_destroy(queue));
}

static void check_job_refused(kvf_job job) {
    kvf_completion completion;
    CHECK_STATUS(KVF_ERR_INVALID_HANDLE, kvf_job_poll(job, &completion, sizeof completion));
    CHECK_STATUS(KVF_ERR_INVALID_HANDLE, kvf_job_wait(job, 0, &completion, sizeof completion));
    CHECK_STATUS(KVF_ERR_INVALID_HANDLE, kvf_job_cancel(job));
    CHECK_STATUS(KVF_ERR_INVALID_HANDLE, kvf_job_release(job));
}

static void check_llama_refused(kvf_llama llama) {
    char byte = 0;
    uint64_t bytes;
    CHECK_STATUS(KVF_ERR_INVALID_HANDLE, kvf_llama_describe(llama, NULL, 0, &bytes));
    CHECK_STATUS(KVF_ERR_INVALID_HANDLE, kvf_llama_size(llama, 0, &bytes));
    CHECK_STATUS(KVF_ERR_INVALID_HANDLE, kvf_llama_save(llama, 0, &byte, 1, NULL, NULL));
    CHECK_STATUS(KVF_ERR_INVALID_HANDLE, kvf_llama_load(llama, 0, &byte, 1, NULL, NULL));
    CHECK_STATUS(KVF_ERR_INVALID_HANDLE, kvf_llama_settle(llama));
    CHECK_STATUS(KVF_ERR_INVALID_HANDLE, kvf_llama_detach(llama));
}

int main(void) {
    const kvf_engine engine = make_engine();
    const kvf_queue queue = make_queue();
    char from = 1, to = 0;
    const kvf_region region = plain_region(&from, 1, 0);
    kvf_job job = 0;
    CHECK_OK(kvf_regions_save(engine, &region, 1, &to, 1, NULL, &job));
    CHECK_OK(kvf_job_wait(job, KVF_FOREVER, NULL, 0));

    const uint64_t made_up[] = {0, 1, 7, 8, UINT64_C(1) << 63, UINT64_MAX, (uintptr_t)&from};
    for (size_t i = 0; i < sizeof made_up / sizeof made_up[0]; ++i) {
        check_engine_refused(made_up[i], KVF_ERR_INVALID_HANDLE);
        check_queue_refused(made_up[i]);
        check_job_refused(made_up[i]);
        check_llama_refused(made_up[i]);
    }
    /* Live, but of another type. */
    check_engine_refused(queue, KVF_ERR_INVALID_HANDLE);
    check_engine_refused(job, KVF_ERR_INVALID_HANDLE);
    check_queue_refused(engine);
    check_queue_refused(job);
    check_job_refused(engine);
    check_job_refused(queue);
    check_llama_refused(engine);
    /* The same number with the bits of another type. */
    for (uint64_t type = 0; type < 8; ++type) {
        const uint64_t other = (engine & ~UINT64_C(7)) | type;
        if (other != engine) check_engine_refused(other, KVF_ERR_INVALID_HANDLE);
    }

    /* Destroyed, and destroyed twice. */
    CHECK_OK(kvf_job_release(job));
    check_job_refused(job);
    CHECK_OK(kvf_queue_destroy(queue));
    check_queue_refused(queue);
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.queue = queue;
    CHECK_STATUS(KVF_ERR_INVALID_HANDLE,
                 kvf_regions_save(engine, &region, 1, &to, 1, &options, NULL));
    CHECK_OK(kvf_engine_destroy(engine));
    check_engine_refused(engine, KVF_ERR_INVALID_HANDLE);

    /* Numbers are not used twice. */
    uint64_t last = job > queue ? job : queue;
    for (int i = 0; i < 1000; ++i) {
        const kvf_queue next = make_queue();
        CHECK(next > last);
        last = next;
        CHECK_OK(kvf_queue_destroy(next));
    }

    /* Where a handle should be written. */
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_engine_create(NULL, NULL));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_queue_create(NULL));
    return 0;
}
