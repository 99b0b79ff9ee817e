// A child of a process that uses CUDA has no CUDA, says so, and works with host memory; the parent
// goes on.
#include <sys/wait.h>
#include <unistd.h>

#include "cuda.hpp"

namespace {

void child(kvf_engine inherited) {
    CHECK_STATUS(KVF_ERR_FORKED, kvf_engine_describe(inherited, nullptr, 0, nullptr));
    const kvf_engine engine = make_engine_without_cuda("forked");
#ifndef __SANITIZE_THREAD__ // TSan does not know threads of such a child
    unsigned char from[500], to[500];
    memset(from, 5, sizeof from);
    const kvf_region region = plain_region(from, sizeof from, 0);
    kvf_job job;
    CHECK_OK(kvf_regions_save(engine, &region, 1, to, sizeof to, nullptr, &job));
    succeed(job);
    CHECK(memcmp(from, to, sizeof to) == 0);
    void *buffer; // whose pool watches what lies idle with a thread
    CHECK_OK(kvf_buffer_alloc(engine, 5000, &buffer));
    memset(buffer, 1, 5000);
    CHECK_OK(kvf_buffer_free(buffer));
#endif
    CHECK_OK(kvf_engine_destroy(engine));
    exit(0);
}

} // namespace

int main() {
    Random random(15);
    const uint64_t bytes = 2 * MiB;
    const Context context;
    const Holdings holdings;
    Engine engine;
    {
        const Bytes content = random_bytes(random, bytes);
        const DeviceMemory device(content);
        const Buffer buffer(engine, Kind::Pool, bytes), pageable(engine, Kind::Pageable, bytes);
        const Regions regions = {{device.address(), bytes, 1, 0, 0, 0}};
        const Stream stream;
        for (int i = 0; i < 3; ++i) {
            Barrier barrier;
            barrier.close(stream);
            kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
            options.flags = KVF_SUBMIT_FOLLOW_STREAM;
            options.stream = stream.number();
            const kvf_job waiting = start(engine, Way::Save, regions, buffer, options);
            const kvf_job moving = start(engine, Way::Save, regions, pageable);
// ASan's own allocator does not survive a fork while starting threads allocate.
#ifdef __SANITIZE_ADDRESS__
            sleep_ms(100);
#endif
            const pid_t pid = fork();
            CHECK(pid >= 0);
            if (pid == 0) child(engine);
            int status;
            CHECK(waitpid(pid, &status, 0) == pid);
            CHECK(status == 0);
            barrier.open();
            succeed(waiting);
            succeed(moving);
            CHECK(buffer.holds(content) && pageable.holds(content));
            stream.synchronize();
        }
    }
    engine.destroy();
    holdings.check_same();
    return 0;
}
