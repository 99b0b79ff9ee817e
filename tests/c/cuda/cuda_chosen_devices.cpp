// An engine opens the CUDA devices that its options name, and touches no other.
#include "cuda.hpp"

namespace {

constexpr int kDevices = 4;
constexpr uint64_t kBytes = 100'000;

struct Made {
    kvf_engine engine = 0;
    int32_t status;
    char error[256] = "";

    explicit Made(uint64_t cuda_devices, uint32_t devices = KVF_DEVICES_AUTO) {
        kvf_engine_options options = KVF_ENGINE_OPTIONS_INIT;
        options.devices = devices;
        options.cuda_devices = cuda_devices;
        options.error = error;
        options.error_size = sizeof error;
        status = kvf_engine_create(&options, &engine);
    }
    ~Made() {
        if (status == KVF_OK) CHECK_OK(kvf_engine_destroy(engine));
    }
    Made(const Made &) = delete;
    Made &operator=(const Made &) = delete;
};

void check_refused(int32_t status, const char *text, uint64_t cuda_devices, uint32_t devices) {
    const Made made(cuda_devices, devices);
    CHECK_STATUS(status, made.status);
    if (!strstr(made.error, text)) fprintf(stderr, "%s\n", made.error);
    CHECK(strstr(made.error, text));
}

void only_what_is_named_costs_anything() {
    const Driver &d = driver();
    const uint64_t contexts = d.count("live_contexts"), streams = d.count("live_streams");
    uint64_t streams_of_one;
    {
        const Made one(1 << 1);
        CHECK_OK(one.status);
        CHECK(d.count("live_contexts") == contexts + 1);
        streams_of_one = d.count("live_streams") - streams;
        CHECK(streams_of_one > 0);
    }
    {
        const Made two(1 << 1 | 1 << 3);
        CHECK_OK(two.status);
        CHECK(d.count("live_contexts") == contexts + 2);
        CHECK(d.count("live_streams") == streams + 2 * streams_of_one);
    }
    {
        const Made all(0);
        CHECK_OK(all.status);
        CHECK(d.count("live_contexts") == contexts + kDevices);
    }
    CHECK(d.count("live_contexts") == contexts && d.count("live_streams") == streams);
}

// Also where the ordinals have gaps, and a job follows the default stream of a device.
void memory_of_what_is_named_moves() {
    const Made made(1 << 1 | 1 << 3, KVF_DEVICES_CUDA);
    CHECK_OK(made.status);
    for (int ordinal = 0; ordinal < kDevices; ++ordinal) {
        const Context context(ordinal);
        const DeviceMemory memory(Bytes(kBytes, static_cast<unsigned char>(ordinal + 1)));
        const Buffer buffer(made.engine, Kind::Pool, kBytes);
        const Regions regions = {{memory.address(), kBytes, 1, 0, 0, 0}};
        char error[256] = "";
        kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
        options.flags = KVF_SUBMIT_FOLLOW_STREAM;
        options.error = error;
        options.error_size = sizeof error;
        if (ordinal == 1 || ordinal == 3) {
            succeed(start(made.engine, Way::Save, regions, buffer, options));
            CHECK(buffer.holds(Bytes(kBytes, static_cast<unsigned char>(ordinal + 1))));
            continue;
        }
        CHECK_STATUS(KVF_ERR_UNREACHABLE,
                     kvf_regions_save(made.engine, regions.data(), 1, buffer.data(), kBytes,
                                      &options, nullptr));
        CHECK(strstr(error, "is not among the engine's"));
    }
}

void what_is_named_and_missing_is_an_error() {
    for (const uint32_t devices : {KVF_DEVICES_AUTO, KVF_DEVICES_CUDA}) {
        check_refused(KVF_ERR_NO_DEVICE, "device 5: the CUDA driver shows 4", 1 << 5, devices);
        check_refused(KVF_ERR_NO_DEVICE, "device 63", 1 | uint64_t{1} << 63, devices);
        driver().fail("cuDevicePrimaryCtxRetain", 2, CUDA_ERROR_DEVICE_UNAVAILABLE, 0);
        check_refused(KVF_ERR_NO_DEVICE, "device 2: ", 1 << 0 | 1 << 2, devices);
    }
    // One that is not named is nobody's concern.
    driver().lose_device(0, CUDA_ERROR_ECC_UNCORRECTABLE, 1);
    CHECK_OK(Made(1 << 2).status);
    driver().reset();
    check_refused(KVF_ERR_INVALID_ARGUMENT, "host alone", 1, KVF_DEVICES_HOST);
}

} // namespace

int main() {
    need_simulation();
    setenv("KVFSIM_DEVICES", "4", 1);
    driver().reset();
    CHECK_CUDA(driver().cuInit(0));
    const Holdings holdings;
    only_what_is_named_costs_anything();
    memory_of_what_is_named_moves();
    what_is_named_and_missing_is_an_error();
    holdings.check_same();
    return 0;
}
