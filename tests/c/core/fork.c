/* fork() with jobs in flight: the child is told that its parent's handles are not its own, works
 * with an engine of its own, and ends cleanly; the parent goes on. */
#include <pthread.h>
#include <stdatomic.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

static kvf_engine engine;
static kvf_queue queue;
static kvf_job job;
static void *pool_buffer;
static atomic_bool stop;

static void move_something(kvf_engine with, kvf_queue into) {
    char from[5000], to[5000];
    memset(from, 3, sizeof from);
    const kvf_region region = plain_region(from, sizeof from, 0);
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.queue = into;
    CHECK_OK(kvf_regions_save(with, &region, 1, to, sizeof to, &options, NULL));
    kvf_completion completion;
    CHECK(kvf_queue_take(into, &completion, sizeof completion, 1, 20 * SECONDS) == 1);
    CHECK(completion.status == KVF_OK && memcmp(from, to, sizeof to) == 0);
}

static void child(void) {
    kvf_completion completion;
    kvf_region region = plain_region(&completion, 1, 0);
    char to;
    void *buffer;
    CHECK_STATUS(KVF_ERR_FORKED, kvf_engine_describe(engine, NULL, 0, NULL));
    CHECK_STATUS(KVF_ERR_FORKED, kvf_engine_cancel(engine));
    CHECK_STATUS(KVF_ERR_FORKED, kvf_engine_destroy(engine));
    CHECK_STATUS(KVF_ERR_FORKED, kvf_buffer_alloc(engine, 1, &buffer));
    CHECK_STATUS(KVF_ERR_FORKED, kvf_regions_save(engine, &region, 1, &to, 1, NULL, NULL));
    CHECK_STATUS(KVF_ERR_FORKED, kvf_queue_fd(queue));
    CHECK_STATUS(KVF_ERR_FORKED, kvf_queue_take(queue, &completion, sizeof completion, 1, 0));
    CHECK_STATUS(KVF_ERR_FORKED, kvf_queue_destroy(queue));
    CHECK_STATUS(KVF_ERR_FORKED, kvf_job_poll(job, NULL, 0));
    CHECK_STATUS(KVF_ERR_FORKED, kvf_job_cancel(job));
    CHECK_STATUS(KVF_ERR_FORKED, kvf_job_release(job));

    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_buffer_free(pool_buffer)); /* the parent's, too */

#ifndef __SANITIZE_THREAD__ /* TSan does not know threads of such a child */
    const kvf_engine own = make_engine();
    const kvf_queue own_queue = make_queue();
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.queue = queue; /* the parent's */
    CHECK_STATUS(KVF_ERR_FORKED, kvf_regions_save(own, &region, 1, &to, 1, &options, NULL));
    move_something(own, own_queue);
    CHECK_OK(kvf_buffer_alloc(own, 1000, &buffer));
    CHECK_OK(kvf_buffer_free(buffer));
    CHECK_OK(kvf_engine_destroy(own));
    CHECK_OK(kvf_queue_destroy(own_queue));
#endif
    exit(0); /* with everything that runs at an exit */
}

/* Keeps the library's locks busy while the process forks. */
static void *disturb(void *argument) {
    (void)argument;
    const kvf_queue into = make_queue();
    while (!atomic_load(&stop)) {
        move_something(engine, into);
        void *buffer;
        CHECK_OK(kvf_buffer_alloc(engine, 1000, &buffer));
        CHECK_OK(kvf_buffer_free(buffer));
        const kvf_engine other = make_engine();
        CHECK_OK(kvf_engine_destroy(other));
    }
    CHECK_OK(kvf_queue_destroy(into));
    return NULL;
}

int main(void) {
    engine = make_engine();
    queue = make_queue();
    CHECK_OK(kvf_buffer_alloc(engine, 4096, &pool_buffer));
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.queue = queue;
    job = start_long_job(engine, &options);
/* ASan's own allocator does not survive a fork beside threads that allocate. */
#ifndef __SANITIZE_ADDRESS__
    pthread_t disturber;
    CHECK(pthread_create(&disturber, NULL, disturb, NULL) == 0);
#else
    (void)disturb;
    usleep(100000); /* and threads that start do */
#endif

    for (int i = 0; i < 20; ++i) {
        fflush(NULL);
        const pid_t pid = fork();
        CHECK(pid >= 0);
        if (pid == 0) child();
        int status;
        CHECK(waitpid(pid, &status, 0) == pid);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
        CHECK(kvf_job_poll(job, NULL, 0) == 0);
    }
#ifndef __SANITIZE_ADDRESS__
    atomic_store(&stop, true);
    CHECK(pthread_join(disturber, NULL) == 0);
#endif
    CHECK(!is_readable(kvf_queue_fd(queue)));
    CHECK_OK(kvf_job_cancel(job));
    kvf_completion completion;
    CHECK(kvf_queue_take(queue, &completion, sizeof completion, 1, 20 * SECONDS) == 1);
    CHECK(completion.status == KVF_ERR_CANCELLED);
    CHECK_OK(kvf_job_release(job));
    CHECK_OK(kvf_buffer_free(pool_buffer));
    CHECK_OK(kvf_engine_destroy(engine));
    CHECK_OK(kvf_queue_destroy(queue));
    return 0;
}
