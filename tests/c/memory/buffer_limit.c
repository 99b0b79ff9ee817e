/* The pool's limit counts free buffers too, which make room for others before a buffer
 * is refused. */
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

    /* The text says how much is taken of how much. What is free has made room before. */
    char error[128];
    CHECK_OK(kvf_buffer_alloc_with_error(engine, 640 << 10, &buffers[0], error, sizeof error));
    CHECK_OK(kvf_buffer_alloc(engine, 64 << 10, &more));
    CHECK_OK(kvf_buffer_free(more));
    more = NULL;
    CHECK_STATUS(KVF_ERR_PINNED_LIMIT,
                 kvf_buffer_alloc_with_error(engine, 512 << 10, &more, error, sizeof error));
    CHECK(!more);
    CHECK(strstr(error, ": 640 KiB of 1 MiB taken, 512 KiB wanted"));
    memset(error, 'x', sizeof error);
    CHECK_STATUS(KVF_ERR_PINNED_LIMIT,
                 kvf_buffer_alloc_with_error(engine, 512 << 10, &more, error, 4));
    CHECK(strlen(error) == 3 && error[4] == 'x');
    CHECK_STATUS(KVF_ERR_PINNED_LIMIT,
                 kvf_buffer_alloc_with_error(engine, 512 << 10, &more, NULL, 0));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT,
                 kvf_buffer_alloc_with_error(engine, 0, &more, error, sizeof error));
    CHECK(strstr(error, "bytes is 0"));
    CHECK_OK(kvf_buffer_free(buffers[0]));
    CHECK_OK(kvf_engine_destroy(engine));
    return 0;
}
