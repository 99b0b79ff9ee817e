// Every entry point of the driver fails in turn, at its first calls, in the middle and at the last
// one: an engine is made or refused with a reason, each job ends once with the right bytes or an
// error, nothing crashes, hangs or leaks.
#include <map>

#include "cuda.hpp"

namespace {

constexpr uint64_t kRoom = 256 * KiB;

constexpr CUresult kErrors[] = {CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_OUT_OF_MEMORY,
                                CUDA_ERROR_UNKNOWN};

struct Fault {
    const char *what;
    uint64_t nth;
    CUresult error;
    bool forever;
};

// Whether this entry point releases something, which stays if the driver refuses to.
bool releases(const std::string &entry_point) {
    for (const char *word : {"Free", "Destroy", "Unload", "Unregister", "Release"}) {
        if (entry_point.find(word) != std::string::npos) return true;
    }
    // kvferry releases things under a context that it makes current.
    return entry_point.find("cuCtxPushCurrent") == 0;
}

class Trial {
public:
    explicit Trial(uint64_t seed) : random_(seed) {}

    void run() {
        const Context context;
        const Stream stream;
        const DeviceMemory device(random_bytes(random_, kRoom));
        const Plan plan = make_plan(random_, Style::Mixed, kRoom, 60);
        const Driver &d = driver();
        if (fault_.what) d.fail(fault_.what, fault_.nth, fault_.error, fault_.forever);
        with_engine(plan, device, stream);
        for (const char *name : names()) calls[name] = d.calls(name);
        // Ends the fault, so that what this function holds can be released.
        d.reset();
        d.cuCtxSynchronize();
    }

    void run(const Fault &fault) {
        fault_ = fault;
        run();
    }

    static std::vector<const char *> names() {
        return {
#define NAME(name, symbol, parameters) #symbol,
            CUDA_DRIVER_ENTRY_POINTS(NAME)
#undef NAME
        };
    }

    bool gave_up = false; // the device: what it has stays behind
    std::map<std::string, uint64_t> calls;

private:
    void with_engine(const Plan &plan, const DeviceMemory &device, const Stream &stream) {
        kvf_engine_options options = KVF_ENGINE_OPTIONS_INIT;
        char error[512] = "";
        options.devices = KVF_DEVICES_CUDA;
        options.copy_threads = 1;
        options.error = error;
        options.error_size = sizeof error;
        kvf_engine engine = 0;
        const int32_t status = kvf_engine_create(&options, &engine);
        if (status != KVF_OK) {
            CHECK(status == KVF_ERR_NO_DEVICE && engine == 0 && error[0]);
            return;
        }
        void *pooled = nullptr;
        const int32_t allocated = kvf_buffer_alloc(engine, plan.buffer_bytes, &pooled);
        CHECK(allocated == KVF_OK || pooled == nullptr);
        Bytes own(plan.buffer_bytes), pageable(plan.buffer_bytes);
        const int32_t registered = kvf_buffer_register(engine, own.data(), own.size());

        for (const bool follow : {false, true}) {
            if (pooled)
                move(engine, plan, device, static_cast<unsigned char *>(pooled), follow, stream);
            move(engine, plan, device, own.data(), follow, stream);
            move(engine, plan, device, pageable.data(), follow, stream);
        }
        char json[8192];
        CHECK_OK(kvf_engine_describe(engine, json, sizeof json, nullptr));
        gave_up = fault_.error != CUDA_ERROR_UNKNOWN && strstr(json, "\"broken\": true");
        if (registered == KVF_OK) {
            const int32_t status = kvf_buffer_unregister(engine, own.data());
            CHECK(status == KVF_OK || (gave_up && status == KVF_ERR_DEVICE_LOST));
        }
        if (pooled) CHECK_OK(kvf_buffer_free(pooled));
        CHECK_OK(kvf_engine_destroy(engine));
    }

    void move(kvf_engine engine, const Plan &plan, const DeviceMemory &device,
              unsigned char *buffer, bool follow, const Stream &stream) {
        const kvf_queue queue = make_queue();
        const Regions regions = plan.at(device.address());
        for (const Way way : {Way::Save, Way::Load}) {
            Bytes memory = device.read();
            Bytes expected = random_bytes(random_, plan.buffer_bytes);
            std::copy(expected.begin(), expected.end(), buffer);
            model(plan, way, memory, expected);
            kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
            char error[512] = "";
            options.queue = queue;
            options.error = error;
            options.error_size = sizeof error;
            options.priority = between(random_, 0, 1);
            if (follow) {
                options.flags = KVF_SUBMIT_FOLLOW_STREAM;
                options.stream = stream.number();
            }
            kvf_job job = 0;
            const int32_t status =
                way == Way::Save ? kvf_regions_save(engine, regions.data(), regions.size(), buffer,
                                                    plan.buffer_bytes, &options, &job)
                                 : kvf_regions_load(engine, regions.data(), regions.size(), buffer,
                                                    plan.buffer_bytes, &options, &job);
            if (status != KVF_OK) {
                CHECK(job == 0 && error[0]);
                continue;
            }
            if (follow) kvf_job_stream_wait(job, stream.number());
            kvf_completion completion[2];
            CHECK(kvf_queue_take(queue, completion, sizeof *completion, 2, 20 * SECONDS) == 1);
            CHECK_OK(kvf_job_release(job));
            if (completion->status == KVF_OK) {
                CHECK(device.read() == memory);
                CHECK(std::equal(expected.begin(), expected.end(), buffer));
            } else {
                CHECK(completion->detail[0]);
                // Of a device that is lost, copies may be under way here that a real one would have
                // ended.
                driver().cuCtxSynchronize();
            }
        }
        CHECK_OK(kvf_queue_destroy(queue));
    }

    Random random_;
    Fault fault_{};
};

} // namespace

int main() {
    setenv("KVFERRY_STUCK_SECONDS", "1", 1);
    need_simulation();
    const Driver &d = driver();
    const Context context; // so that leaks are not cleared away with it
    Trial clean(1);
    { // The driver is opened once in a process.
        const Engine engine;
    }
    d.reset();
    clean.run();

    unsigned trials = 0;
    for (const char *name : Trial::names()) {
        const uint64_t calls = clean.calls[name];
        std::vector<uint64_t> occasions = {1, 2, calls / 2, calls};
        std::sort(occasions.begin(), occasions.end());
        occasions.erase(std::unique(occasions.begin(), occasions.end()), occasions.end());
        for (const uint64_t nth : occasions) {
            if (nth == 0 || nth > calls) continue;
            // Every kind of error at the first call, and one of them, in turn, later on.
            std::vector<Fault> faults;
            for (const CUresult error : kErrors) {
                if (nth > 1 && error != kErrors[trials % std::size(kErrors)]) continue;
                faults.push_back({name, nth, error, false});
                if (nth == 1) faults.push_back({name, nth, error, true});
            }
            for (const Fault &fault : faults) {
                if (std::getenv("KVFERRY_TEST_VERBOSE")) {
                    fprintf(stderr, "%s:%u:%d%s\n", name, static_cast<unsigned>(fault.nth),
                            fault.error, fault.forever ? "+" : "");
                }
                const Holdings holdings;
                Trial trial(++trials);
                trial.run(fault);
                if (!trial.gave_up && !releases(name)) holdings.check_same();
            }
        }
    }

    // The driver is as good as new.
    Trial(1).run();
    return 0;
}
