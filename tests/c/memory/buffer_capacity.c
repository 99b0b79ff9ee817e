/* A buffer's capacity is what it takes of the pool: little more than its size. With a limit it
 * depends on the size alone, and rounding is no reason to refuse. */
#include <unistd.h>

#include "check.h"

#define MIB (UINT64_C(1) << 20)

static uint64_t mapped(kvf_engine engine) {
    char json[8192];
    CHECK_OK(kvf_engine_describe(engine, json, sizeof json, NULL));
    const char *value = strstr(strstr(json, "\"pool\""), "\"mapped\": ");
    CHECK(value);
    return strtoull(value + strlen("\"mapped\": "), NULL, 10);
}

static kvf_engine limited(uint64_t bytes) {
    kvf_engine_options options = KVF_ENGINE_OPTIONS_INIT;
    options.devices = KVF_DEVICES_HOST;
    options.pinned_limit = bytes;
    kvf_engine engine;
    CHECK_OK(kvf_engine_create(&options, &engine));
    return engine;
}

static void little_more_than_the_size(void) {
    const kvf_engine engine = make_engine();
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t sum = 0;
    for (uint64_t bytes = 1; bytes < 40 * MIB; bytes += bytes / 3 + 1) {
        unsigned char *buffer;
        uint64_t capacity = 0;
        CHECK_OK(kvf_buffer_alloc(engine, bytes, (void **)&buffer));
        CHECK_OK(kvf_buffer_capacity(buffer, &capacity));
        CHECK(capacity >= bytes && capacity <= bytes + bytes / 16 + page);
        buffer[capacity - 1] = 1;
        sum +=
            capacity; /* not freed before the sum has been compared: else one serves for the next */
        CHECK(mapped(engine) == sum);
    }
    CHECK_OK(kvf_engine_destroy(engine)); /* and with the process its buffers */
}

static void with_a_limit_the_size_alone_decides(void) {
    const kvf_engine engine = limited(100 * MIB);
    void *buffer;
    uint64_t fresh, capacity;
    CHECK_OK(kvf_buffer_alloc(engine, 10 * MIB, &buffer));
    CHECK_OK(kvf_buffer_capacity(buffer, &fresh));
    CHECK_OK(kvf_buffer_free(buffer));
    CHECK_OK(kvf_buffer_trim(engine));
    CHECK_OK(kvf_buffer_alloc(engine, 11 * MIB, &buffer));
    CHECK_OK(kvf_buffer_free(buffer)); /* free now, and large enough for the next */
    CHECK_OK(kvf_buffer_alloc(engine, 10 * MIB, &buffer));
    CHECK_OK(kvf_buffer_capacity(buffer, &capacity));
    CHECK(capacity == fresh);
    CHECK_OK(kvf_buffer_free(buffer));
    CHECK_OK(kvf_engine_destroy(engine));
}

static void rounding_is_no_reason_to_refuse(void) {
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    const uint64_t bytes = 32 * MIB + 1;
    const kvf_engine engine = limited(32 * MIB + page);
    void *buffer, *more;
    uint64_t capacity;
    CHECK_OK(kvf_buffer_alloc(engine, bytes, &buffer));
    CHECK_OK(kvf_buffer_capacity(buffer, &capacity));
    CHECK(capacity == 32 * MIB + page && mapped(engine) == capacity);
    CHECK_STATUS(KVF_ERR_PINNED_LIMIT, kvf_buffer_alloc(engine, 1, &more));
    CHECK_OK(kvf_buffer_free(buffer));
    CHECK_OK(kvf_engine_destroy(engine));
}

static void only_buffers_have_one(void) {
    const kvf_engine engine = make_engine();
    static unsigned char own[1 << 16];
    unsigned char *buffer;
    uint64_t capacity = 7;
    CHECK_OK(kvf_buffer_alloc(engine, 10000, (void **)&buffer));
    CHECK_OK(kvf_buffer_register(engine, own, sizeof own));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_buffer_capacity(buffer, NULL));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_buffer_capacity(NULL, &capacity));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_buffer_capacity(buffer + 1, &capacity));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_buffer_capacity(own, &capacity));
    CHECK_OK(kvf_buffer_unregister(engine, own));
    CHECK_OK(kvf_engine_destroy(engine));
    CHECK(capacity == 7);
    CHECK_OK(kvf_buffer_capacity(buffer, &capacity));
    CHECK(capacity >= 10000);
    CHECK_OK(kvf_buffer_free(buffer));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_buffer_capacity(buffer, &capacity));
}

int main(void) {
    little_more_than_the_size();
    with_a_limit_the_size_alone_decides();
    rounding_is_no_reason_to_refuse();
    only_buffers_have_one();
    return 0;
}
