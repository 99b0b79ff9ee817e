/* A process may end at any time: with jobs in flight, threads that wait, and callbacks
 * under way. */
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

static kvf_queue queue;

static void *take_forever(void *argument) {
    (void)argument;
    kvf_completion completion;
    for (;;) kvf_queue_take(queue, &completion, sizeof completion, 1, KVF_FOREVER);
    return NULL;
}

static void again(const kvf_completion *completion) {
    static char from[100], to[100];
    const kvf_region region = plain_region(from, sizeof from, 0);
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.callback = again;
    options.queue = queue;
    kvf_regions_save(completion->user_data, &region, 1, to, sizeof to, &options, NULL);
}

/* Called when the process ends: the library still works then. */
static kvf_engine last_engine;
static void at_exit(void) {
    CHECK_OK(kvf_engine_cancel(last_engine));
    char json[8192];
    CHECK_OK(kvf_engine_describe(last_engine, json, sizeof json, NULL));
}

int main(int count, char **arguments) {
    (void)arguments;
    (void)count;
    for (int i = 0; i < 10; ++i) {
        fflush(NULL);
        const pid_t pid =
            fork(); /* before the library is used: the child is a process of its own */
        CHECK(pid >= 0);
        if (pid == 0) {
            last_engine = make_engine();
            queue = make_queue();
            kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
            options.queue = queue;
            start_long_job(last_engine, &options);
            pthread_t thread;
            CHECK(pthread_create(&thread, NULL, take_forever, NULL) == 0);
            options.callback = again;
            options.user_data = last_engine;
            CHECK_OK(kvf_regions_save(last_engine, NULL, 0, NULL, 0, &options, NULL));
            void *buffer;
            CHECK_OK(kvf_buffer_alloc(last_engine, 1 << 20, &buffer));
            if (i % 2) atexit(at_exit);
            sleep_ms(i);
            exit(i);
        }
        int status;
        CHECK(waitpid(pid, &status, 0) == pid);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == i);
    }
    return 0;
}
