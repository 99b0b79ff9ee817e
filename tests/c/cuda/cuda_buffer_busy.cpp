// A buffer cannot be freed or unregistered while a job in flight uses it, from inside a larger one
// too.
#include "cuda.hpp"

int main() {
    const uint64_t bytes = MiB;
    const Context context;
    const Holdings holdings;
    Engine engine;
    const Stream stream;
    {
        const DeviceMemory memory(bytes);
        void *pooled;
        CHECK_OK(kvf_buffer_alloc(engine, 2 * bytes, &pooled));
        Bytes own(2 * bytes);
        CHECK_OK(kvf_buffer_register(engine, own.data(), own.size()));
        for (const bool of_pool : {true, false}) {
            Barrier barrier;
            barrier.close(stream);
            kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
            options.flags = KVF_SUBMIT_FOLLOW_STREAM;
            options.stream = stream.number();
            const kvf_region region = {memory.address(), bytes, 1, 0, 0, 0};
            unsigned char *buffer = of_pool ? static_cast<unsigned char *>(pooled) : own.data();
            const auto release = [&] {
                return of_pool ? kvf_buffer_free(pooled)
                               : kvf_buffer_unregister(engine, own.data());
            };
            kvf_job job;
            CHECK_OK(kvf_regions_save(engine, &region, 1, buffer + 5, bytes, &options, &job));
            CHECK_STATUS(KVF_ERR_BUSY, release());
            barrier.open();
            succeed(job);
            CHECK_OK(release());
            CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, release());
            stream.synchronize();
        }
    }
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_buffer_register(engine, nullptr, 5));
    engine.destroy();
    return 0;
}
