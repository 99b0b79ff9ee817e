/* 100,000 jobs, each raced by a cancel from another thread: every one ends with exactly one
 * completion in its queue and one call of its callback, both with the same status, and nothing is
 * moved after it. */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#include "check.h"

enum { TRIES = 100000, SLOTS = 256, BYTES = 24 << 10 };

static kvf_engine engine;
static kvf_queue queue;
static unsigned char memory[SLOTS][BYTES], buffers[SLOTS][BYTES];
static _Atomic uint64_t handles[TRIES]; /* for the threads that cancel */
static unsigned char in_queue[TRIES], in_callback[TRIES];
static int32_t queue_status[TRIES], callback_status[TRIES];
static _Atomic uint64_t slot_of[TRIES];
static atomic_int slot_busy[SLOTS];

static void on_completion(const kvf_completion *completion) {
    ++in_callback[completion->user_data];
    callback_status[completion->user_data] = completion->status;
}

/* Cancels every second job, in the order of submission, as soon as it sees its handle. */
static void *cancel(void *argument) {
    for (uint64_t i = (uintptr_t)argument; i < TRIES; i += 2) {
        uint64_t job;
        while ((job = atomic_load_explicit(&handles[i], memory_order_acquire)) == 0) sched_yield();
        CHECK_OK(kvf_job_cancel(job));
        CHECK_OK(kvf_job_release(job));
    }
    return NULL;
}

static void *take(void *argument) {
    (void)argument;
    kvf_completion completions[64];
    for (int taken = 0; taken < TRIES;) {
        const int32_t n =
            kvf_queue_take(queue, completions, sizeof completions[0], 64, KVF_FOREVER);
        CHECK(n > 0);
        for (int32_t i = 0; i < n; ++i) {
            const kvf_completion *done = &completions[i];
            ++in_queue[done->user_data];
            queue_status[done->user_data] = done->status;
            const uint64_t slot = atomic_load(&slot_of[done->user_data]);
            if (done->status == KVF_OK && done->user_data % 4 < 2) {
                CHECK(buffers[slot][0] == memory[slot][0]);
                CHECK(buffers[slot][BYTES - 1] == memory[slot][BYTES - 1]);
            }
            /* If anything still moved, the sanitizers or the next user of the slot would see it. */
            memset(buffers[slot], 0, 64);
            atomic_store_explicit(&slot_busy[slot], 0, memory_order_release);
        }
        taken += n;
    }
    return NULL;
}

int main(void) {
    engine = make_engine();
    queue = make_queue();
    for (int slot = 0; slot < SLOTS; ++slot) memset(memory[slot], slot + 1, BYTES);

    pthread_t cancellers[2], taker;
    CHECK(pthread_create(&taker, NULL, take, NULL) == 0);
    for (uintptr_t i = 0; i < 2; ++i) {
        CHECK(pthread_create(&cancellers[i], NULL, cancel, (void *)i) == 0);
    }
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.queue = queue;
    options.callback = on_completion;
    for (uint64_t i = 0; i < TRIES; ++i) {
        const uint64_t slot = i % SLOTS;
        while (atomic_load_explicit(&slot_busy[slot], memory_order_acquire)) sched_yield();
        atomic_store(&slot_busy[slot], 1);
        atomic_store(&slot_of[i], slot);
        options.user_data = i;
        options.priority = (uint32_t)(i & 1);
        kvf_job job = 0;
        kvf_region regions[12];
        if (i % 4 < 2) {
            regions[0] = plain_region(memory[slot], BYTES, 0);
            CHECK_OK(kvf_regions_save(engine, regions, 1, buffers[slot], BYTES, &options, &job));
        } else {
            for (uint64_t r = 0; r < 12; ++r) { /* the irregular rest */
                const uint64_t at = r * 2000 + r * r;
                regions[r] = plain_region(memory[slot] + at, 700 + r, at);
            }
            CHECK_OK(kvf_regions_save(engine, regions, 12, buffers[slot], BYTES, &options, &job));
        }
        atomic_store_explicit(&handles[i], job, memory_order_release);
    }
    CHECK(pthread_join(taker, NULL) == 0);
    for (int i = 0; i < 2; ++i) CHECK(pthread_join(cancellers[i], NULL) == 0);
    CHECK_OK(kvf_engine_destroy(engine)); /* every callback has been called */
    kvf_completion completion;
    CHECK(kvf_queue_take(queue, &completion, sizeof completion, 1, 0) == 0);
    CHECK_OK(kvf_queue_destroy(queue));

    int cancelled = 0;
    for (int i = 0; i < TRIES; ++i) {
        CHECK(in_queue[i] == 1 && in_callback[i] == 1);
        CHECK(queue_status[i] == callback_status[i]);
        CHECK(queue_status[i] == KVF_OK || queue_status[i] == KVF_ERR_CANCELLED);
        cancelled += queue_status[i] == KVF_ERR_CANCELLED;
    }
    printf("%d of %d cancelled\n", cancelled, TRIES);
    return 0;
}
