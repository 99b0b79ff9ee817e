/* Region lists that cannot be meant are refused, by the call, with a text; nothing is submitted. */
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"

static unsigned char memory[4096], buffer[4096];
static kvf_engine engine;
static kvf_queue queue;
static char error[256];
static const uint64_t huge = UINT64_MAX;
static uint64_t here; /* the address of `memory` */
static uint64_t page; /* bytes of a page */

static int32_t submit(const kvf_region *regions, uint64_t count, void *to, uint64_t bytes) {
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.queue = queue;
    options.error = error;
    options.error_size = sizeof error;
    error[0] = 0;
    kvf_job job = 7, other = 7;
    const int32_t status = kvf_regions_save(engine, regions, count, to, bytes, &options, &job);
    const int32_t load = kvf_regions_load(engine, regions, count, to, bytes, &options, &other);
    CHECK_STATUS(status, load); /* both directions check alike */
    CHECK(status < 0 && job == 7 && other == 7 && error[0]);
    return status;
}

static void check_malformed(kvf_region region) {
    uint64_t bytes = 7;
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_regions_size(&region, 1, &bytes));
    CHECK(bytes == 7);
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, submit(&region, 1, buffer, sizeof buffer));
    /* Also behind a good one; the text says which. */
    const kvf_region both[] = {plain_region(memory, 1, 0), region};
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, submit(both, 2, buffer, sizeof buffer));
    CHECK(strstr(error, "region 1"));
}

static void malformed_regions(void) {
    check_malformed((kvf_region){here, 0, 1, 0, 0, 0});
    check_malformed((kvf_region){here, 1, 0, 0, 0, 0});
    check_malformed((kvf_region){0, 1, 1, 0, 0, 0});
    check_malformed((kvf_region){here, 8, 2, 7, 0, 8}); /* rows that overlap in memory */
    check_malformed((kvf_region){here, 8, 2, 8, 0, 7}); /* ... and in the buffer */
    check_malformed((kvf_region){here, 8, 2, 0, 0, 0});
    check_malformed((kvf_region){here, huge, 1, 0, 0, 0});
    check_malformed((kvf_region){here, 1, 1, 0, huge, 0});
    check_malformed((kvf_region){huge, 1, 1, 0, 0, 0});
    check_malformed((kvf_region){here, 1, huge, huge, 0, 1});
    check_malformed((kvf_region){here, 1, huge, 1, 0, huge});
    check_malformed((kvf_region){here, 1, huge, 1, 0, 1});
    check_malformed((kvf_region){here, 1, 3, UINT64_C(1) << 63, 0, 1});
    check_malformed((kvf_region){here, 1, 3, 1, 0, UINT64_C(1) << 63});
    check_malformed((kvf_region){here, UINT64_C(1) << 32, (UINT64_C(1) << 32) + 1,
                                 UINT64_C(1) << 32, 0, UINT64_C(1) << 32});
}

static void pitches_of_a_plain_run_are_not_read(void) {
    uint64_t bytes = 0;
    const kvf_region plain = {here, 10, 1, huge, 20, huge};
    CHECK_OK(kvf_regions_size(&plain, 1, &bytes));
    CHECK(bytes == 30);
    kvf_job job;
    CHECK_OK(kvf_regions_save(engine, &plain, 1, buffer, 30, NULL, &job));
    CHECK_OK(kvf_job_wait(job, KVF_FOREVER, NULL, 0));
    CHECK_OK(kvf_job_release(job));
}

/* The end of the region that reaches furthest. */
static void sizes(void) {
    uint64_t bytes = 0;
    const kvf_region three[] = {
        {here, 10, 1, 0, 100, 0}, {here, 4, 3, 8, 0, 6}, {here, 1, 1, 0, 5, 0}};
    CHECK_OK(kvf_regions_size(three, 3, &bytes));
    CHECK(bytes == 110);
    CHECK_OK(kvf_regions_size(three + 1, 1, &bytes));
    CHECK(bytes == 16);
    CHECK_OK(kvf_regions_size(NULL, 0, &bytes));
    CHECK(bytes == 0);
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_regions_size(NULL, 1, &bytes));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_regions_size(three, 3, NULL));

    CHECK_STATUS(KVF_ERR_BUFFER_TOO_SMALL, submit(three, 3, buffer, 109));
    CHECK(strstr(error, "110") && strstr(error, "109"));
    CHECK_STATUS(KVF_ERR_BUFFER_TOO_SMALL, submit(three, 3, buffer, 0));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, submit(three, 3, NULL, 110));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, submit(NULL, 1, buffer, 110));
}

/* A page with nothing around it; wide holes, which the next mapping of anybody's does not fill. */
static unsigned char *map_page_alone(void) {
    enum { HOLE = 64 << 20 };
    unsigned char *begin =
        mmap(NULL, 2 * HOLE + page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(begin != MAP_FAILED);
    unsigned char *const alone = begin + HOLE;
    CHECK(mprotect(alone, page, PROT_READ | PROT_WRITE) == 0);
    CHECK(munmap(begin, HOLE) == 0 && munmap(alone + page, HOLE) == 0);
    return alone;
}

/* Memory of a region that is not there, at its beginning or end. */
static void unmapped_regions(unsigned char *alone) {
    const kvf_region before = plain_region(alone - 1, 2, 0);
    const kvf_region behind = plain_region(alone + page - 1, 2, 0);
    const kvf_region rows = {(uintptr_t)alone, 8, 2, page, 0, 8};
    const kvf_region kernel = plain_region((void *)(uintptr_t)(UINT64_C(0xffff) << 48), 8, 0);
    const kvf_region low = plain_region((void *)(uintptr_t)8, 8, 0);
    CHECK_STATUS(KVF_ERR_UNREACHABLE, submit(&before, 1, buffer, sizeof buffer));
    CHECK_STATUS(KVF_ERR_UNREACHABLE, submit(&behind, 1, buffer, sizeof buffer));
    CHECK_STATUS(KVF_ERR_UNREACHABLE, submit(&rows, 1, buffer, sizeof buffer));
    CHECK_STATUS(KVF_ERR_UNREACHABLE, submit(&kernel, 1, buffer, sizeof buffer));
    CHECK_STATUS(KVF_ERR_UNREACHABLE, submit(&low, 1, buffer, sizeof buffer));
}

/* Mapped without access, as the CUDA driver keeps the addresses of device memory. */
static void memory_without_access(void) {
    void *reserved = mmap(NULL, 1 << 24, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(reserved != MAP_FAILED);
    const kvf_region without_access = plain_region((char *)reserved + 5, 100, 0);
    CHECK_STATUS(KVF_ERR_UNREACHABLE, submit(&without_access, 1, buffer, sizeof buffer));
    /* Only the last page is without access: of one region, or of the last of many that lie in a
     * row. */
    enum { PAGES = 600 };
    CHECK(mprotect(reserved, PAGES * page, PROT_READ | PROT_WRITE) == 0);
    const kvf_region ends_there = plain_region((char *)reserved + PAGES * page - 8, 16, 0);
    CHECK_STATUS(KVF_ERR_UNREACHABLE, submit(&ends_there, 1, buffer, sizeof buffer));
    static unsigned char large_buffer[(PAGES + 1) * 16];
    kvf_region in_a_row[PAGES + 1];
    for (uint64_t i = 0; i <= PAGES; ++i) {
        in_a_row[i] = plain_region((char *)reserved + i * page, 16, i * 16);
    }
    CHECK_STATUS(KVF_ERR_UNREACHABLE,
                 submit(in_a_row, PAGES + 1, large_buffer, sizeof large_buffer));
    const kvf_region good = plain_region(memory, 16, 0);
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT,
                 submit(&good, 1, (char *)reserved + PAGES * page - 8, 16));
    CHECK(munmap(reserved, 1 << 24) == 0);
}

static void unmapped_buffers(unsigned char *alone) {
    const kvf_region good = plain_region(memory, 16, 0);
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, submit(&good, 1, alone - 1, 16));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, submit(&good, 1, alone + page - 1, 16));
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, submit(&good, 1, (void *)(uintptr_t)8, 16));
    /* A buffer that would reach around the end of the address space to memory that is mapped. */
    const kvf_region around = plain_region(memory, 1, huge - page);
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, submit(&around, 1, alone + 100, huge));
}

int main(void) {
    engine = make_engine();
    queue = make_queue();
    here = (uintptr_t)memory;
    page = (uint64_t)sysconf(_SC_PAGESIZE);
    malformed_regions();
    pitches_of_a_plain_run_are_not_read();
    sizes();
    unsigned char *const alone = map_page_alone();
    unmapped_regions(alone);
    memory_without_access();
    unmapped_buffers(alone);

    /* Nothing of all this was submitted. */
    CHECK_OK(kvf_engine_destroy(engine));
    kvf_completion completion;
    CHECK(kvf_queue_take(queue, &completion, sizeof completion, 1, 0) == 0);
    CHECK_OK(kvf_queue_destroy(queue));
    return 0;
}
