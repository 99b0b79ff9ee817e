/* The queue's descriptor is readable exactly while the queue holds something. */
#include <fcntl.h>

#include "check.h"

int main(void) {
    const kvf_engine engine = make_engine();
    const kvf_queue queue = make_queue();
    const int fd = kvf_queue_fd(queue);
    CHECK(fd >= 0);
    CHECK(fcntl(fd, F_GETFD) & FD_CLOEXEC);
    CHECK(kvf_queue_fd(queue) == fd);
    CHECK(!is_readable(fd));

    char from = 3, to[3] = {0};
    const kvf_region region = plain_region(&from, 1, 0);
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.queue = queue;
    kvf_completion completion;
    for (int round = 0; round < 1000; ++round) {
        const int count = 1 + round % 3;
        for (int i = 0; i < count; ++i) {
            options.user_data = (uint64_t)round * 10 + (uint64_t)i;
            options.priority = (uint32_t)(round % 2);
            CHECK_OK(kvf_regions_save(engine, &region, 1, &to[i], 1, &options, NULL));
        }
        struct pollfd poll_fd = {fd, POLLIN, 0};
        for (int i = 0; i < count; ++i) {
            CHECK(poll(&poll_fd, 1, 10000) == 1);
            CHECK(kvf_queue_take(queue, &completion, sizeof completion, 1, 0) == 1);
            CHECK(completion.status == KVF_OK && completion.bytes == 1);
            CHECK(completion.submitted_ns <= completion.started_ns);
            CHECK(completion.started_ns <= completion.finished_ns);
            CHECK(completion.detail[0] == 0);
        }
        CHECK(!is_readable(fd));
        CHECK(kvf_queue_take(queue, &completion, sizeof completion, 1, 0) == 0);
        CHECK(!is_readable(fd));
    }
    CHECK(to[0] == 3 && to[1] == 3 && to[2] == 3);
    CHECK_OK(kvf_engine_destroy(engine));
    CHECK_OK(kvf_queue_destroy(queue));
    return 0;
}
