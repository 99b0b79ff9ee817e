/* Memory that cannot be written is refused where it would be written, and serves where it
 * is read. */
#include <sys/mman.h>

#include "check.h"

enum { BYTES = 1 << 20 };

static unsigned char *map(int protection) {
    void *memory = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED);
    memset(memory, 3, BYTES);
    CHECK(mprotect(memory, BYTES, protection) == 0);
    return memory;
}

int main(void) {
    const kvf_engine engine = make_engine();
    unsigned char *own = map(PROT_READ | PROT_WRITE), *read_only = map(PROT_READ);
    const kvf_region of_own = plain_region(own, BYTES, 0);
    const kvf_region of_read_only = plain_region(read_only, BYTES, 0);
    char error[256] = "";
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.error = error;
    options.error_size = sizeof error;
    for (uint32_t priority = 0; priority < 2; ++priority) {
        options.priority = priority;
        CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT,
                     kvf_regions_save(engine, &of_own, 1, read_only, BYTES, &options, NULL));
        CHECK(strstr(error, "cannot be written"));
        CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT,
                     kvf_regions_load(engine, &of_read_only, 1, own, BYTES, &options, NULL));
        CHECK(strstr(error, "cannot be written"));

        kvf_job job;
        memset(own, 0, BYTES);
        CHECK_OK(kvf_regions_save(engine, &of_read_only, 1, own, BYTES, &options, &job));
        CHECK_OK(kvf_job_wait(job, KVF_FOREVER, NULL, 0));
        CHECK_OK(kvf_job_release(job));
        CHECK(memcmp(own, read_only, BYTES) == 0);
        CHECK_OK(kvf_regions_load(engine, &of_own, 1, read_only, BYTES, &options, &job));
        CHECK_OK(kvf_job_wait(job, KVF_FOREVER, NULL, 0));
        CHECK_OK(kvf_job_release(job));
    }
    /* Its end alone. */
    CHECK(mprotect(own + BYTES - 4096, 4096, PROT_READ) == 0);
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT,
                 kvf_regions_save(engine, &of_read_only, 1, own, BYTES, &options, NULL));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT,
                 kvf_regions_load(engine, &of_own, 1, read_only, BYTES, &options, NULL));
    CHECK_OK(kvf_engine_destroy(engine));
    return 0;
}
