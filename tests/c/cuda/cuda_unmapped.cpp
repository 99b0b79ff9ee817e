// Registered memory that its owner unmaps under a transfer: the job ends with an error. A read-only
// buffer is refused.
#include "cuda.hpp"

int main() {
    need_simulation(); // a real device still has the pages
    const Driver &d = driver();
    const uint64_t bytes = MiB;
    const Context context;
    Engine engine;
    const DeviceMemory device(bytes);
    const kvf_region region = {device.address(), bytes, 1, 0, 0, 0};
    void *memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED);
    kvf_job job = 0;

    CHECK(mprotect(memory, bytes, PROT_READ) == 0);
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT,
                 kvf_regions_save(engine, &region, 1, memory, bytes, nullptr, &job));
    CHECK_OK(kvf_regions_load(engine, &region, 1, memory, bytes, nullptr, &job));
    succeed(job);
    CHECK(mprotect(memory, bytes, PROT_READ | PROT_WRITE) == 0);

    CHECK_OK(kvf_buffer_register(engine, memory, bytes));
    d.hold("copy", 1, 0);
    CHECK_OK(kvf_regions_save(engine, &region, 1, memory, bytes, nullptr, &job));
    CHECK(d.wait_held(1, 20'000));
    munmap(memory, bytes);
    d.release();
    const kvf_completion completion = finish(job);
    CHECK(completion.status != KVF_OK && completion.detail[0]);
    CHECK_OK(kvf_buffer_unregister(engine, memory));
    return 0;
}
