/* Attaching without a libllama in the process fails with a text that says so, and leaves the
 * engine. */
#include "check.h"

int main(void) {
    const kvf_engine engine = make_engine();
    char error[256] = "", context[64] = "not a context";
    kvf_llama_options options = KVF_LLAMA_OPTIONS_INIT;
    options.error = error;
    options.error_size = sizeof error;
    kvf_llama llama = 7;
    struct llama_context *const pointer = (struct llama_context *)(void *)context;
    CHECK_STATUS(KVF_ERR_LIBRARY_NOT_FOUND, kvf_llama_attach(engine, pointer, &options, &llama));
    CHECK(llama == 7 && strstr(error, "libllama"));
    options.library = "nowhere";
    CHECK_STATUS(KVF_ERR_LIBRARY_NOT_FOUND, kvf_llama_attach(engine, pointer, &options, &llama));
    CHECK(strstr(error, "nowhere"));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_llama_attach(engine, NULL, &options, &llama));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_llama_attach(engine, pointer, &options, NULL));
    options.flags = 1u << 30;
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_llama_attach(engine, pointer, &options, &llama));
    options.flags = 0;
    options.size = 3;
    CHECK_STATUS(KVF_ERR_STRUCT_SIZE, kvf_llama_attach(engine, pointer, &options, &llama));
    CHECK_OK(kvf_engine_destroy(engine)); /* no attachment holds it */
    return 0;
}
