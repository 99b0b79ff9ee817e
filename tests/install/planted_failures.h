/* Included before examples/c/conversation.c by the compiler: lets one call that can fail fail, and
 * counts what is taken and freed.
 *
 * FAIL_AT=N          the Nth of these calls fails
 * SMALL_BUFFER=1     kvf_llama_size() says one byte too few
 *
 * The program ends with status 3 if it has not freed what it has taken. (LeakSanitizer sees only
 * what malloc gave.) */
#include <errno.h>
#include <ggml-backend.h>
#include <kvferry.h>
#include <llama.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdio_ext.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int held; /* engines, attachments, buffers, jobs */

static bool planted(void) {
    static int calls;
    const char *fail_at = getenv("FAIL_AT");
    return fail_at && ++calls == atoi(fail_at);
}

static int32_t taken(int32_t status) {
    held += status == KVF_OK;
    return status;
}

static int32_t released(int32_t status) {
    held -= status == KVF_OK;
    return status;
}

__attribute__((destructor)) static void check_all_freed(void) {
    if (held == 0) return;
    fprintf(stderr, "%d objects have not been freed\n", held);
    _exit(3);
}

static int32_t size_of_state(kvf_llama llama, int32_t sequence, uint64_t *bytes) {
    const int32_t status = kvf_llama_size(llama, sequence, bytes);
    *bytes -= getenv("SMALL_BUFFER") != NULL;
    return status;
}

static int32_t wait_for_job(kvf_job job, int64_t timeout_ns, kvf_completion *done, uint64_t size) {
    const int32_t status = kvf_job_wait(job, timeout_ns, done, size);
    if (planted()) {
        done->status = KVF_ERR_DEVICE;
        strcpy(done->detail, "planted");
    }
    return status;
}

#define OR_FAIL(failure, call) (planted() ? (failure) : (call))

#define kvf_engine_create(...) OR_FAIL(KVF_ERR_SYSTEM, taken(kvf_engine_create(__VA_ARGS__)))
#define kvf_llama_attach(...) OR_FAIL(KVF_ERR_TAP, taken(kvf_llama_attach(__VA_ARGS__)))
#define kvf_llama_size(...) OR_FAIL(KVF_ERR_LLAMA, size_of_state(__VA_ARGS__))
#define kvf_buffer_alloc(...) OR_FAIL(KVF_ERR_OUT_OF_MEMORY, taken(kvf_buffer_alloc(__VA_ARGS__)))
#define kvf_llama_save(...) OR_FAIL(KVF_ERR_BUSY, taken(kvf_llama_save(__VA_ARGS__)))
#define kvf_llama_load(...) OR_FAIL(KVF_ERR_BUSY, taken(kvf_llama_load(__VA_ARGS__)))
#define kvf_job_wait(...) wait_for_job(__VA_ARGS__)
#define kvf_job_release(job) released(kvf_job_release(job))
#define kvf_buffer_free(buffer) released(kvf_buffer_free(buffer))
#define kvf_llama_detach(llama) released(kvf_llama_detach(llama))
#define kvf_engine_destroy(engine) released(kvf_engine_destroy(engine))

#define llama_model_load_from_file(...) OR_FAIL(NULL, llama_model_load_from_file(__VA_ARGS__))
#define llama_init_from_model(...) OR_FAIL(NULL, llama_init_from_model(__VA_ARGS__))
#define llama_decode(...) OR_FAIL(1, llama_decode(__VA_ARGS__))

#define fopen(...) OR_FAIL((errno = EACCES, (FILE *)NULL), fopen(__VA_ARGS__))
#define fread(...) OR_FAIL(0, fread(__VA_ARGS__))
#define fwrite(...) OR_FAIL(0, fwrite(__VA_ARGS__))
#define fseek(...) OR_FAIL(-1, fseek(__VA_ARGS__))
#define fclose(file) (__fwriting(file) ? OR_FAIL((fclose(file), EOF), fclose(file)) : fclose(file))
