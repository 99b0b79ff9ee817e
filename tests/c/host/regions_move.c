/* Regions of every shape: a save copies what stood there, a load writes it there, nothing else
 * changes. */
#include "check.h"

enum { MEMORY = 3 << 20, BUFFER = 3 << 20, MOST = 4096 };
static unsigned char memory[MEMORY], buffer[BUFFER], expected[BUFFER];
static kvf_region regions[MOST];
static kvf_engine engine;
static unsigned seed = 1;

static unsigned next_random(unsigned below) {
    seed = seed * 1664525u + 1013904223u;
    return (unsigned)((uint64_t)seed * below >> 32);
}

static void fill(unsigned char *bytes, uint64_t count) {
    for (uint64_t i = 0; i < count; ++i) bytes[i] = (unsigned char)next_random(256);
}

static unsigned char *at(uint64_t address) { return (unsigned char *)(uintptr_t)address; }

static void check_both_ways(uint64_t count, uint32_t priority) {
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.priority = priority;
    kvf_job job;
    kvf_completion completion;
    uint64_t bytes = 0, moved = 0;
    CHECK_OK(kvf_regions_size(regions, count, &bytes));
    CHECK(bytes <= BUFFER);

    fill(memory, MEMORY);
    memset(buffer, 0xaa, BUFFER);
    memset(expected, 0xaa, BUFFER);
    for (uint64_t i = 0; i < count; ++i) {
        const kvf_region *r = &regions[i];
        for (uint64_t row = 0; row < r->rows; ++row) {
            memcpy(expected + r->offset + row * r->buffer_pitch, at(r->address + row * r->pitch),
                   r->width);
        }
        moved += r->rows * r->width;
    }
    CHECK_OK(kvf_regions_save(engine, regions, count, buffer, bytes, &options, &job));
    CHECK_OK(kvf_job_wait(job, KVF_FOREVER, &completion, sizeof completion));
    CHECK_OK(kvf_job_release(job));
    CHECK(completion.status == KVF_OK && completion.bytes == moved);
    CHECK(completion.segments <= completion.fragments && completion.segments > 0);
    CHECK(memcmp(buffer, expected, BUFFER) == 0);

    static unsigned char before[MEMORY];
    fill(memory, MEMORY);
    fill(buffer, BUFFER);
    memcpy(before, memory, MEMORY);
    for (uint64_t i = 0; i < count; ++i) {
        const kvf_region *r = &regions[i];
        for (uint64_t row = 0; row < r->rows; ++row) {
            const uint64_t place = r->address + row * r->pitch - (uintptr_t)memory;
            memcpy(before + place, buffer + r->offset + row * r->buffer_pitch, r->width);
        }
    }
    CHECK_OK(kvf_regions_load(engine, regions, count, buffer, bytes, &options, &job));
    CHECK_OK(kvf_job_wait(job, KVF_FOREVER, &completion, sizeof completion));
    CHECK_OK(kvf_job_release(job));
    CHECK(completion.status == KVF_OK && completion.bytes == moved);
    CHECK(memcmp(memory, before, MEMORY) == 0);
}

static void set(int i, uint64_t from, uint64_t width, uint64_t rows, uint64_t pitch,
                uint64_t offset, uint64_t buffer_pitch) {
    regions[i] = (kvf_region){(uintptr_t)memory + from, width, rows, pitch, offset, buffer_pitch};
}

/* Regions that do not overlap, neither in memory nor in the buffer. */
static uint64_t random_regions(void) {
    uint64_t from = next_random(100), offset = next_random(100), count = 0;
    while (count < MOST) {
        const uint64_t widths[] = {1, 2, 3, 4, 8, 16, 100, 2048, 70000};
        const uint64_t width = widths[next_random(9)];
        const uint64_t rows = next_random(4) ? 1 : 1 + next_random(20);
        const uint64_t pitch = width + (next_random(2) ? next_random(50) : 0);
        const uint64_t buffer_pitch = width + (next_random(2) ? next_random(50) : 0);
        if (from + rows * pitch > MEMORY || offset + rows * buffer_pitch > BUFFER) break;
        regions[count++] =
            (kvf_region){(uintptr_t)memory + from, width, rows, pitch, offset, buffer_pitch};
        from += rows * pitch + (next_random(2) ? next_random(100) : 0);
        offset += rows * buffer_pitch + (next_random(2) ? next_random(100) : 0);
    }
    /* In any order. */
    if (next_random(2)) {
        for (uint64_t i = count; i > 1; --i) {
            const uint64_t other = next_random((unsigned)i);
            const kvf_region region = regions[i - 1];
            regions[i - 1] = regions[other];
            regions[other] = region;
        }
    }
    return count;
}

int main(void) {
    engine = make_engine();
    for (uint32_t priority = 0; priority < 2; ++priority) {
        set(0, 13, 2 << 20, 1, 0, 5, 0); /* one long run, more than a piece, odd alignment */
        check_both_ways(1, priority);
        set(0, 0, 1, 1, 0, 0, 0);
        check_both_ways(1, priority);
        set(0, 7, 2048, 1000, 3000, 1, 2048); /* rows at a pitch */
        check_both_ways(1, priority);
        set(0, 0, 300000, 3, 600000, 11, 300001); /* few, wide rows */
        check_both_ways(1, priority);
        set(0, 0, 600000, 3, 1000000, 0, 700000); /* rows wider than a background piece */
        check_both_ways(1, priority);
        set(0, 0, 4096, 100, 4096, 0, 4096); /* pitch is width: in fact one run */
        check_both_ways(1, priority);
        set(0, 0, 2, 100000, 8, 0, 2); /* one element of each row, as in a transposed V */
        check_both_ways(1, priority);
        /* Two whose rows lie between each other's. */
        set(0, 0, 100, 500, 400, 0, 200);
        set(1, 200, 100, 500, 400, 100, 200);
        check_both_ways(2, priority);
        for (int i = 0; i < 2000; ++i) set(i, (uint64_t)i * 1000, 500, 1, 0, (uint64_t)i * 500, 0);
        check_both_ways(2000, priority);
        for (int i = 0; i < 2000; ++i) { /* the irregular rest */
            set(i, (uint64_t)i * 1000 + (uint64_t)i % 7 * 3, 400, 1, 0, (uint64_t)(1999 - i) * 401,
                0);
        }
        check_both_ways(2000, priority);
        for (int i = 0; i < 40; ++i) check_both_ways(random_regions(), priority);
    }

    /* The regions are the caller's again as soon as the call returns. */
    set(0, 0, 1 << 20, 1, 0, 0, 0);
    kvf_job job;
    CHECK_OK(kvf_regions_save(engine, regions, 1, buffer, BUFFER, NULL, &job));
    memset(regions, 0xff, sizeof regions[0]);
    CHECK_OK(kvf_job_wait(job, KVF_FOREVER, NULL, 0));
    CHECK_OK(kvf_job_release(job));
    CHECK(memcmp(memory, buffer, 1 << 20) == 0);
    CHECK_OK(kvf_engine_destroy(engine));
    return 0;
}
