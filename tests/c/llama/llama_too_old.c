/* A libllama that is loaded, but lacks what kvferry needs, is named as such: it is not "no
 * libllama". */
#include <dlfcn.h>

#include "check.h"

int main(int count, char **arguments) {
    CHECK(count == 2);
    const kvf_engine engine = make_engine();
    char error[512] = "", context[64] = "not a context";
    kvf_llama_options options = KVF_LLAMA_OPTIONS_INIT;
    options.error = error;
    options.error_size = sizeof error;
    struct llama_context *const pointer = (struct llama_context *)(void *)context;
    kvf_llama llama;
    CHECK_STATUS(KVF_ERR_LIBRARY_NOT_FOUND, kvf_llama_attach(engine, pointer, &options, &llama));

    CHECK(dlopen(arguments[1], RTLD_NOW));
    CHECK_STATUS(KVF_ERR_UNSUPPORTED, kvf_llama_attach(engine, pointer, &options, &llama));
    CHECK(strstr(error, arguments[1]));
    CHECK(strstr(error, "too old"));
    CHECK(strstr(error, "llama_state_seq_get_data_ext"));
    options.library = arguments[1];
    CHECK_STATUS(KVF_ERR_UNSUPPORTED, kvf_llama_attach(engine, pointer, &options, &llama));
    options.library = "another";
    CHECK_STATUS(KVF_ERR_LIBRARY_NOT_FOUND, kvf_llama_attach(engine, pointer, &options, &llama));
    CHECK_OK(kvf_engine_destroy(engine)); /* no attachment holds it */
    return 0;
}
