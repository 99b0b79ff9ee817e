// Every context has a default stream, and all have the same names. The name stands for the stream
// of the caller's current context and those of the devices whose memory moves; where no context is
// current, for those of all devices.
#include "cuda.hpp"

namespace {

const uint64_t kBytes = 100'000;
const CUstream kNames[] = {nullptr, CU_STREAM_LEGACY, CU_STREAM_PER_THREAD};

kvf_submit_options following(CUstream stream) {
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.flags = KVF_SUBMIT_FOLLOW_STREAM;
    options.stream = reinterpret_cast<uint64_t>(stream);
    return options;
}

bool is_idle(CUstream stream) { return driver().cuStreamQuery(stream) == CUDA_SUCCESS; }

// Whose device's context is current where a call is made.
enum class Caller { OfTheMemory, OfTheOther, Bare };
constexpr Caller kCallers[] = {Caller::OfTheMemory, Caller::OfTheOther, Caller::Bare};

template <class Function>
void act_as(Caller caller, const Context &other, Function &&function) {
    if (caller == Caller::OfTheMemory) return function();
    std::thread([&] {
        if (caller == Caller::OfTheOther) other.adopt();
        function();
    }).join();
}

// Memory of the second device, whose context is current, and other memory of the first.
struct Test {
    kvf_engine engine;
    const Context &first, &second;
    uint64_t address_on_first;

    Random random{7};
    const Bytes before = random_bytes(random, kBytes), after = random_bytes(random, kBytes);
    const DeviceMemory memory{before}, source{after};
    const Buffer buffer{engine, Kind::Pool, kBytes}, others_buffer{engine, Kind::Pool, kBytes};
    const Regions regions = {{memory.address(), kBytes, 1, 0, 0, 0}};
    const Regions others = {{address_on_first, kBytes, 1, 0, 0, 0}};
};

// A job that follows the name waits for the stream of the memory's device.
void job_follows(const Test &test, CUstream name, Caller caller) {
    test.memory.write(test.before);
    Barrier barrier;
    barrier.close(name);
    CHECK_CUDA(
        driver().cuMemcpyDtoDAsync(test.memory.address(), test.source.address(), kBytes, name));
    kvf_job job;
    act_as(caller, test.first, [&] {
        job = start(test.engine, Way::Save, test.regions, test.buffer, following(name));
    });
    sleep_ms(5);
    CHECK(!has_ended(job));
    // Neither the caller's context nor the memory's waits.
    act_as(Caller::OfTheOther, test.first, [&] {
        succeed(start(test.engine, Way::Save, test.others, test.others_buffer, following(name)));
    });
    barrier.open();
    succeed(job);
    CHECK(test.buffer.holds(test.after));
}

// The stream of that name waits for a job.
void stream_waits(const Test &test, CUstream name, Caller caller) {
    const Stream own;
    Barrier barrier;
    barrier.close(own);
    const kvf_job job =
        start(test.engine, Way::Load, test.regions, test.buffer, following(own.get()));
    act_as(caller, test.first,
           [&] { CHECK_OK(kvf_job_stream_wait(job, reinterpret_cast<uint64_t>(name))); });
    sleep_ms(2);
    CHECK(!is_idle(name));
    test.first.adopt();
    CHECK(is_idle(name) == (caller == Caller::OfTheMemory));
    test.second.adopt();
    barrier.open();
    CHECK_CUDA(driver().cuStreamSynchronize(name));
    CHECK(has_ended(job));
    test.first.adopt();
    CHECK_CUDA(driver().cuStreamSynchronize(name));
    test.second.adopt();
    succeed(job);
}

// A wait that is refused, because the nth of the calls fails, leaves no stream waiting.
void refused_wait(const Test &test, const char *call, uint64_t nth) {
    const Stream own;
    Barrier barrier;
    barrier.close(own);
    const kvf_job job =
        start(test.engine, Way::Load, test.regions, test.buffer, following(own.get()));
    driver().fail(call, nth, CUDA_ERROR_OUT_OF_MEMORY, 0);
    int32_t status = KVF_OK;
    act_as(Caller::Bare, test.first, [&] { status = kvf_job_stream_wait(job, 0); });
    CHECK(status == KVF_OK || status == KVF_ERR_OUT_OF_MEMORY);
    driver().reset();
    driver().set("devices", 2);
    if (status != KVF_OK) {
        CHECK_CUDA(driver().cuStreamSynchronize(nullptr));
        CHECK(!has_ended(job));
    }
    barrier.open();
    succeed(job);
    for (const Context *context : {&test.first, &test.second}) {
        context->adopt();
        CHECK_CUDA(driver().cuStreamSynchronize(nullptr));
    }
}

} // namespace

int main() {
    need_several_devices(2);
    const Context first(0);
    const DeviceMemory of_first(kBytes);
    const Context second(1); // is current
    const Holdings holdings;
    Engine engine;
    {
        const Test test{engine, first, second, of_first.address()};
        for (const CUstream name : kNames) {
            for (const Caller caller : kCallers) job_follows(test, name, caller);
            for (const Caller caller : kCallers) stream_waits(test, name, caller);
        }
        if (driver().simulated()) {
            for (const char *call : {"cuEventCreate", "cuEventRecord", "cuStreamWaitValue32"}) {
                for (const uint64_t nth : {1, 2, 3, 4}) refused_wait(test, call, nth);
            }
        }
    }
    engine.destroy();
    holdings.check_same();
    return 0;
}
