// Without a CUDA driver or device that can be used, an engine says why: KVF_DEVICES_AUTO makes one
// of the host alone, KVF_DEVICES_CUDA is refused.
#include <sys/wait.h>
#include <unistd.h>

#include "cuda.hpp"

namespace {

void check_host_engine(const char *why) {
    const kvf_engine engine = make_engine_without_cuda(why);
    static unsigned char from[1000], to[1000];
    memset(from, 7, sizeof from);
    const kvf_region region = plain_region(from, sizeof from, 0);
    kvf_job job;
    CHECK_OK(kvf_regions_save(engine, &region, 1, to, sizeof to, nullptr, &job));
    succeed(job);
    CHECK(memcmp(from, to, sizeof to) == 0);
    void *buffer;
    CHECK_OK(kvf_buffer_alloc(engine, 5000, &buffer));
    CHECK_OK(kvf_buffer_free(buffer));
    CHECK_OK(kvf_buffer_register(engine, from, sizeof from));
    CHECK_OK(kvf_buffer_unregister(engine, from));
    CHECK_OK(kvf_engine_destroy(engine));
}

} // namespace

int main() {
    if (std::getenv("KVFERRY_TEST_GPU")) SKIP("needs the simulated driver");
    const struct {
        const char *variable, *value, *why;
    } cases[] = {
        {"KVFERRY_CUDA_DRIVER", "/nowhere/libcuda.so.1", "no CUDA driver"},
        {"KVFERRY_CUDA_DRIVER", "libm.so.6", "too old"},
        {"KVFSIM_DRIVER_VERSION", "10020", "it supports CUDA 10.2, and 11.0 is needed"},
        {"KVFSIM_FAIL", "cuDriverGetVersion:1:999", "cuDriverGetVersion: CUDA_ERROR_UNKNOWN"},
        {"KVFSIM_DEVICES", "0", "cuInit: CUDA_ERROR_NO_DEVICE"},
        {"KVFSIM_INIT_ERROR", "803", "cuInit: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"},
        {"KVFSIM_FAIL", "cuDeviceGetCount:1:999+", "cuDeviceGetCount: CUDA_ERROR_UNKNOWN"},
        {"KVFSIM_FAIL", "cuDevicePrimaryCtxRetain:1:2+",
         "device 0: out of memory: cuDevicePrimaryCtxRetain"},
    };
    // One process opens the driver once.
    for (const auto &one : cases) {
        const pid_t pid = fork();
        CHECK(pid >= 0);
        if (pid == 0) {
            setenv(one.variable, one.value, 1);
            check_host_engine(one.why);
            exit(0);
        }
        int status;
        CHECK(waitpid(pid, &status, 0) == pid);
        if (status != 0) fprintf(stderr, "%s=%s\n", one.variable, one.value);
        CHECK(status == 0);
    }
    return 0;
}
