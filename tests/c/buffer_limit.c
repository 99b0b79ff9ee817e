/* The pool's limit counts free buffers too, which make room for others before a buffer is refused. */
#include "check.h"

int main(void) {
    kvf_engine_options options = KVF_ENGINE_OPTIONS_INIT;
    options.devices = KVF_DEVICES_HOST;
    options.pinned_limit = 1 << 20;
    kvf_engine engine;
    CHECK_OK(kvf_engine_create(&options, &engine));
    void *buffers[4], *more = NULL;
    for (int i = 0; i < 4; ++i) CHECK_OK(kvf_buffer_alloc(engine, 256 << 10, &buffers[i]));
    CHECK_STATUS(KVF_ERR_PINNED_LIMIT, kvf_buffer_alloc(engine, 1, &more));
    CHECK(!more);
    CHECK_OK(kvf_buffer_free(buffers[0]));
    CHECK_OK(kvf_buffer_alloc(engine, 1, &more)); /* the free one goes, for its size does not fit */
    CHECK_OK(kvf_buffer_free(more));
    for (int i = 1; i < 4; ++i) CHECK_OK(kvf_buffer_free(buffers[i]));
    CHECK_STATUS(KVF_ERR_PINNED_LIMIT, kvf_buffer_alloc(engine, (1 << 20) + 1, &more));
    CHECK_OK(kvf_buffer_alloc(engine, 1 << 20, &more));
    CHECK_OK(kvf_buffer_free(more));
    CHECK_OK(kvf_engine_destroy(engine));
    return 0;
}
