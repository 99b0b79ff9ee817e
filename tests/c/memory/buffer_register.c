/* Memory of the caller's: registered once, not twice or overlapping, not unregistered under
 * a job. */
#include <sys/mman.h>

#include "check.h"

int main(void) {
    const kvf_engine engine = make_engine();
    static unsigned char memory[16 * 4096] __attribute__((aligned(4096)));

    CHECK_OK(kvf_buffer_register(engine, memory + 4096, 4096));
    CHECK_STATUS(KVF_ERR_BUSY, kvf_buffer_register(engine, memory + 4096, 4096));
    CHECK_STATUS(KVF_ERR_BUSY, kvf_buffer_register(engine, memory, 4097));
    CHECK_STATUS(KVF_ERR_BUSY, kvf_buffer_register(engine, memory + 8191, 1));
    CHECK_STATUS(KVF_ERR_BUSY, kvf_buffer_register(engine, memory, sizeof memory));
    CHECK_STATUS(KVF_ERR_BUSY, kvf_buffer_register(engine, memory + 5000, 10));
    CHECK_OK(kvf_buffer_register(engine, memory, 4096)); /* neighbours are no overlap */
    CHECK_OK(kvf_buffer_register(engine, memory + 8192, 4096));

    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_buffer_unregister(engine, memory + 1));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_buffer_unregister(engine, NULL));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_buffer_free(memory)); /* not the pool's */
    for (int i = 0; i < 3; ++i) CHECK_OK(kvf_buffer_unregister(engine, memory + 4096 * i));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_buffer_unregister(engine, memory));

    void *pool;
    CHECK_OK(kvf_buffer_alloc(engine, 4096, &pool));
    CHECK_STATUS(KVF_ERR_BUSY, kvf_buffer_register(engine, pool, 4096));
    CHECK_OK(kvf_buffer_free(pool));

    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_buffer_register(engine, NULL, 1));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_buffer_register(engine, memory, 0));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_buffer_register(engine, memory, UINT64_MAX));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT,
                 kvf_buffer_register(engine, memory, UINT64_MAX - (uintptr_t)memory));
    void *hole = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(hole != MAP_FAILED && munmap(hole, 4096) == 0);
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_buffer_register(engine, hole, 4096));

    /* In use, as a part of it. */
    static kvf_region regions[LONG_JOB_REGIONS];
    for (int i = 0; i < LONG_JOB_REGIONS; ++i) {
        regions[i] = plain_region(long_job_memory, LONG_JOB_BYTES - 8, 0);
    }
    CHECK_OK(kvf_buffer_register(engine, long_job_buffer, LONG_JOB_BYTES));
    kvf_job job;
    CHECK_OK(kvf_regions_save(engine, regions, LONG_JOB_REGIONS, long_job_buffer + 8,
                              LONG_JOB_BYTES - 8, NULL, &job));
    CHECK_STATUS(KVF_ERR_BUSY, kvf_buffer_unregister(engine, long_job_buffer));
    CHECK_OK(kvf_job_cancel(job));
    CHECK_OK(kvf_job_wait(job, KVF_FOREVER, NULL, 0));
    CHECK_OK(kvf_job_release(job));
    CHECK_OK(kvf_buffer_unregister(engine, long_job_buffer));
    CHECK_OK(kvf_engine_destroy(engine));
    return 0;
}
