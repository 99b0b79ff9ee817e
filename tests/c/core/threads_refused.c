/* The system refuses new threads: the submission or the job fails with a status; later
 * ones work. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

static void *nothing(void *argument) { return argument; }

static void allow_threads(rlim_t count) {
    struct rlimit limit;
    CHECK(getrlimit(RLIMIT_NPROC, &limit) == 0);
    limit.rlim_cur = count < limit.rlim_max ? count : limit.rlim_max;
    CHECK(setrlimit(RLIMIT_NPROC, &limit) == 0);
}

static char from[100000], to[100000]; /* enough for threads to be wanted */

static int32_t outcome(kvf_engine engine, const kvf_submit_options *options) {
    const kvf_region region = plain_region(from, sizeof from, 0);
    kvf_job job = 0;
    const int32_t status = kvf_regions_save(engine, &region, 1, to, sizeof to, options, &job);
    if (status != KVF_OK) {
        CHECK(job == 0);
        return status;
    }
    kvf_completion completion;
    CHECK_OK(kvf_job_wait(job, 20 * SECONDS, &completion, sizeof completion));
    CHECK_OK(kvf_job_release(job));
    CHECK((completion.detail[0] != 0) == (completion.status != KVF_OK));
    return completion.status;
}

static void ignore(const kvf_completion *completion) { (void)completion; }

static void limited(void) {
    if (getuid() == 0) CHECK(setuid(65534) == 0); /* the limit does not hold for root */
    const kvf_engine engine = make_engine();
    const kvf_engine busy = make_engine();
    CHECK_OK(outcome(busy, NULL)); /* has its threads */

    allow_threads(1);
    pthread_t thread;
    if (pthread_create(&thread, NULL, nothing, NULL) == 0) {
        pthread_join(thread, NULL);
        SKIP("this system does not limit the number of threads here");
    }
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    CHECK_STATUS(KVF_ERR_SYSTEM, outcome(engine, &options));
    options.priority = KVF_PRIORITY_URGENT;
    CHECK_STATUS(KVF_ERR_SYSTEM, outcome(engine, &options));
    options.callback = ignore;
    CHECK_STATUS(KVF_ERR_SYSTEM, outcome(busy, &options));
    options.callback = NULL;
    CHECK_OK(outcome(busy, &options));

    allow_threads(RLIM_INFINITY);
    for (int i = 0; i < 4; ++i) {
        options.priority = (uint32_t)(i % 2);
        options.callback = i / 2 ? ignore : NULL;
        CHECK_OK(outcome(engine, &options));
    }
    CHECK_OK(kvf_engine_destroy(busy));
    CHECK_OK(kvf_engine_destroy(engine));
    exit(0);
}

int main(void) {
    const pid_t pid = fork(); /* the limits are the child's */
    CHECK(pid >= 0);
    if (pid == 0) limited();
    int status;
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK(WIFEXITED(status));
    return WEXITSTATUS(status);
}
