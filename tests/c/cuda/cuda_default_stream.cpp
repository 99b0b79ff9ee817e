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

} // namespace

int main() {
    need_several_devices(2);
    Random random(7);
    Context first(0);
    const DeviceMemory of_first(kBytes);
    Context second(1); // is current
    const Holdings holdings;
    Engine engine;
    {
        const Bytes before = random_bytes(random, kBytes), after = random_bytes(random, kBytes);
        const DeviceMemory memory(before), source(after);
        const Buffer buffer(engine, Kind::Pool, kBytes);
        const Regions regions = {{memory.address(), kBytes, 1, 0, 0, 0}};
        const Regions others = {{of_first.address(), kBytes, 1, 0, 0, 0}};
        const Buffer others_buffer(engine, Kind::Pool, kBytes);
        for (const CUstream name : kNames) {
            for (const Caller caller : kCallers) {
                memory.write(before);
                Barrier barrier;
                barrier.close(name);
                CHECK_CUDA(
                    driver().cuMemcpyDtoDAsync(memory.address(), source.address(), kBytes, name));
                kvf_job job;
                const auto save = [&] {
                    job = start(engine, Way::Save, regions, buffer, following(name));
                };
                act_as(caller, first, save);
                sleep_ms(5);
                CHECK(!has_ended(job));
                // Neither the caller's context nor the memory's waits.
                act_as(Caller::OfTheOther, first, [&] {
                    succeed(start(engine, Way::Save, others, others_buffer, following(name)));
                });
                barrier.open();
                succeed(job);
                CHECK(buffer.holds(after));
            }

            const Stream own;
            for (const Caller caller : kCallers) {
                Barrier barrier;
                barrier.close(own);
                const kvf_job job = start(engine, Way::Load, regions, buffer, following(own.get()));
                const auto wait = [&] {
                    CHECK_OK(kvf_job_stream_wait(job, reinterpret_cast<uint64_t>(name)));
                };
                act_as(caller, first, wait);
                sleep_ms(2);
                CHECK(!is_idle(name));
                first.adopt();
                CHECK(is_idle(name) == (caller == Caller::OfTheMemory));
                second.adopt();
                barrier.open();
                CHECK_CUDA(driver().cuStreamSynchronize(name));
                CHECK(has_ended(job));
                first.adopt();
                CHECK_CUDA(driver().cuStreamSynchronize(name));
                second.adopt();
                succeed(job);
            }
        }

        // A wait that is refused leaves no stream waiting, whichever of its calls fails.
        if (driver().simulated()) {
            const Stream own;
            for (const char *call : {"cuEventCreate", "cuEventRecord", "cuStreamWaitValue32"}) {
                for (const uint64_t nth : {1, 2, 3, 4}) {
                    Barrier barrier;
                    barrier.close(own);
                    const kvf_job job =
                        start(engine, Way::Load, regions, buffer, following(own.get()));
                    driver().fail(call, nth, CUDA_ERROR_OUT_OF_MEMORY, 0);
                    int32_t status = KVF_OK;
                    act_as(Caller::Bare, first, [&] { status = kvf_job_stream_wait(job, 0); });
                    CHECK(status == KVF_OK || status == KVF_ERR_OUT_OF_MEMORY);
                    driver().reset();
                    driver().set("devices", 2);
                    if (status != KVF_OK) {
                        CHECK_CUDA(driver().cuStreamSynchronize(nullptr));
                        CHECK(!has_ended(job));
                    }
                    barrier.open();
                    succeed(job);
                    for (Context *context : {&first, &second}) {
                        context->adopt();
                        CHECK_CUDA(driver().cuStreamSynchronize(nullptr));
                    }
                }
            }
        }
    }
    engine.destroy();
    holdings.check_same();
    return 0;
}
