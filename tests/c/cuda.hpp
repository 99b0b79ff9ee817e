// What the tests of the CUDA path share: the driver that kvferry uses too, device memory, buffers,
// and random regions with the model that their transfers are compared with.
//
// The driver is the one that KVFERRY_CUDA_DRIVER names, which ctest sets to the simulated one; or,
// with KVFERRY_TEST_GPU=1 in the environment, the real one. Tests that need faults or counters are
// skipped there.
#pragma once

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "cuda/driver_api.h"
#include "simulated_cuda.h"

constexpr uint64_t KiB = 1 << 10, MiB = 1 << 20, GiB = 1 << 30;

// ---- The driver ---------------------------------------------------------------------------------

struct Driver {
#define MEMBER(name, symbol, parameters) CUresult(*name) parameters = nullptr;
    CUDA_DRIVER_ENTRY_POINTS(MEMBER)
#undef MEMBER
    // The controls of the simulated driver; NULL in a real one.
    // clang-format off: it would never be content
#define SIMULATED_CONTROLS(X) \
    X(set) X(reset) X(fail) X(hold) X(release) X(wait_held) X(lose_device) X(begin_capture) \
    X(end_capture) X(count) X(calls) X(peak_queued) X(write) X(read)
// clang-format on
#define MEMBER(name) decltype(&kvfsim_##name) name = nullptr;
    SIMULATED_CONTROLS(MEMBER)
#undef MEMBER

    bool simulated() const { return reset != nullptr; }

    Driver() {
        if (std::getenv("KVFERRY_TEST_GPU")) unsetenv("KVFERRY_CUDA_DRIVER");
        const char *name = std::getenv("KVFERRY_CUDA_DRIVER");
        if (!name && !std::getenv("KVFERRY_TEST_GPU")) SKIP("no KVFERRY_CUDA_DRIVER");
        void *library = dlopen(name ? name : "libcuda.so.1", RTLD_NOW);
        if (!library) SKIP("%s", dlerror());
#define LOAD(name, symbol, parameters)                                                             \
    name = reinterpret_cast<decltype(name)>(dlsym(library, #symbol));
        CUDA_DRIVER_ENTRY_POINTS(LOAD)
#undef LOAD
#define LOAD(name) name = reinterpret_cast<decltype(name)>(dlsym(library, "kvfsim_" #name));
        SIMULATED_CONTROLS(LOAD)
#undef LOAD
    }
};

inline Driver &driver() {
    static Driver instance;
    return instance;
}

inline void need_simulation() {
    if (!driver().simulated()) SKIP("needs the simulated driver");
}

// As need_simulation(), with so many devices. Before the first call of the driver.
inline void need_simulation(int devices) {
    setenv("KVFSIM_DEVICES", std::to_string(devices).c_str(), 1);
    need_simulation();
}

#define CHECK_CUDA(call)                                                                           \
    do {                                                                                           \
        if (const CUresult result_ = (call)) {                                                     \
            fprintf(stderr, "%s:%d: %s returned CUDA error %d\n", __FILE__, __LINE__, #call,       \
                    result_);                                                                      \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

// A device's primary context, retained and current on this thread, as a program's that computes
// there.
class Context {
public:
    explicit Context(int device = 0) : device_(device) {
        CHECK_CUDA(driver().cuInit(0));
        CHECK_CUDA(driver().cuDevicePrimaryCtxRetain(&context_, device));
        CHECK_CUDA(driver().cuCtxPushCurrent(context_));
    }
    ~Context() {
        driver().cuCtxPopCurrent(nullptr);
        driver().cuDevicePrimaryCtxRelease(device_);
    }
    Context(const Context &) = delete;
    Context &operator=(const Context &) = delete;

    // On another thread than the one that made it.
    void adopt() const { CHECK_CUDA(driver().cuCtxSetCurrent(context_)); }

private:
    const int device_;
    CUcontext context_ = nullptr;
};

// Returns how many devices there are, two at least; `simulated` of them on the simulated driver.
inline int need_several_devices(int simulated) {
    setenv("KVFSIM_DEVICES", std::to_string(simulated).c_str(), 1);
    CHECK_CUDA(driver().cuInit(0));
    int count = 0;
    CHECK_CUDA(driver().cuDeviceGetCount(&count));
    if (count < 2) SKIP("one device only");
    return count;
}

using Bytes = std::vector<unsigned char>;

// Of the context that is current. Its content is written and read past all streams.
class DeviceMemory {
public:
    explicit DeviceMemory(uint64_t bytes) : bytes_(bytes) {
        CHECK_CUDA(driver().cuMemAlloc(&address_, bytes));
    }
    explicit DeviceMemory(const Bytes &content) : DeviceMemory(content.size()) { write(content); }
    ~DeviceMemory() { driver().cuMemFree(address_); }
    DeviceMemory(const DeviceMemory &) = delete;
    DeviceMemory &operator=(const DeviceMemory &) = delete;

    uint64_t address() const { return address_; }
    uint64_t bytes() const { return bytes_; }

    void write(std::span<const unsigned char> content, uint64_t at = 0) const {
        const Driver &d = driver();
        if (d.simulated()) {
            CHECK(d.write(address_ + at, content.data(), content.size()) == 0);
            return;
        }
        CHECK_CUDA(d.cuMemcpyHtoDAsync(address_ + at, content.data(), content.size(), nullptr));
        CHECK_CUDA(d.cuStreamSynchronize(nullptr));
    }
    void read(std::span<unsigned char> content, uint64_t at = 0) const {
        const Driver &d = driver();
        if (d.simulated()) {
            CHECK(d.read(content.data(), address_ + at, content.size()) == 0);
            return;
        }
        CHECK_CUDA(d.cuMemcpyDtoHAsync(content.data(), address_ + at, content.size(), nullptr));
        CHECK_CUDA(d.cuStreamSynchronize(nullptr));
    }
    Bytes read() const {
        Bytes content(bytes_);
        read(content);
        return content;
    }

private:
    CUdeviceptr address_ = 0;
    const uint64_t bytes_;
};

class Stream {
public:
    Stream() {
        CHECK_CUDA(driver().cuStreamCreateWithPriority(&stream_, CU_STREAM_NON_BLOCKING, 0));
    }
    ~Stream() { driver().cuStreamDestroy(stream_); }
    Stream(const Stream &) = delete;
    Stream &operator=(const Stream &) = delete;

    CUstream get() const { return stream_; }
    uint64_t number() const { return reinterpret_cast<uint64_t>(stream_); }
    bool is_idle() const { return driver().cuStreamQuery(stream_) == CUDA_SUCCESS; }
    void synchronize() const { CHECK_CUDA(driver().cuStreamSynchronize(stream_)); }

private:
    CUstream stream_ = nullptr;
};

// Keeps streams waiting until it is opened: what a long kernel of somebody else's would do.
class Barrier {
public:
    Barrier() {
        if (!driver().cuStreamWaitValue32) SKIP("the driver is older than CUDA 11.7");
        void *memory;
        CHECK_CUDA(driver().cuMemHostAlloc(&memory, sizeof *word_,
                                           CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP));
        word_ = static_cast<uint32_t *>(memory);
        *word_ = 0;
        CHECK_CUDA(driver().cuMemHostGetDevicePointer(&device_word_, memory, 0));
    }
    ~Barrier() { driver().cuMemFreeHost(word_); }
    Barrier(const Barrier &) = delete;
    Barrier &operator=(const Barrier &) = delete;

    void close(CUstream stream) const {
        CHECK_CUDA(driver().cuStreamWaitValue32(stream, device_word_, 1, CU_STREAM_WAIT_VALUE_EQ));
    }
    void close(const Stream &stream) const { close(stream.get()); }
    void open() { __atomic_store_n(word_, 1, __ATOMIC_RELEASE); }

private:
    uint32_t *word_ = nullptr;
    CUdeviceptr device_word_ = 0;
};

// What the simulated driver holds for its users, to be compared with later.
class Holdings {
public:
    Holdings() : at_first_(now()) {}

    // Everything that was taken since has been released.
    void check_same() const {
        if (!driver().simulated()) return;
        const auto at_last = now();
        for (size_t i = 0; i < at_first_.size(); ++i) {
            if (at_first_[i] == at_last[i]) continue;
            fprintf(stderr, "%s was %llu and is %llu\n", kNames[i],
                    static_cast<unsigned long long>(at_first_[i]),
                    static_cast<unsigned long long>(at_last[i]));
            exit(1);
        }
        CHECK(driver().count("hazards") == 0);
        CHECK(driver().count("capture_violations") == 0);
    }

private:
    static constexpr const char *kNames[] = {
        "live_contexts",           "live_streams",          "live_events",       "live_modules",
        "live_device_allocations", "live_host_allocations", "live_registrations"};

    static std::vector<uint64_t> now() {
        std::vector<uint64_t> counts;
        if (!driver().simulated()) return counts;
        for (const char *name : kNames) counts.push_back(driver().count(name));
        return counts;
    }

    const std::vector<uint64_t> at_first_;
};

// ---- Engine, buffers, jobs ----------------------------------------------------------------------

class Engine {
public:
    explicit Engine(uint64_t staging_bytes = 0) {
        kvf_engine_options options = KVF_ENGINE_OPTIONS_INIT;
        char error[256] = "";
        options.devices = KVF_DEVICES_CUDA;
        options.copy_threads = 2;
        options.staging_bytes = staging_bytes;
        options.error = error;
        options.error_size = sizeof error;
        const int32_t status = kvf_engine_create(&options, &engine_);
        if (status != KVF_OK) fprintf(stderr, "%s\n", error);
        CHECK_OK(status);
    }
    ~Engine() {
        if (engine_) destroy();
    }
    Engine(const Engine &) = delete;
    Engine &operator=(const Engine &) = delete;

    void destroy() {
        CHECK_OK(kvf_engine_destroy(engine_));
        engine_ = 0;
    }
    operator kvf_engine() const { return engine_; }

    bool describes(const char *text) const {
        char json[8192];
        CHECK_OK(kvf_engine_describe(engine_, json, sizeof json, nullptr));
        return strstr(json, text) != nullptr;
    }

private:
    kvf_engine engine_ = 0;
};

// Checks that KVF_DEVICES_CUDA is refused with a text that has `why` in it. Returns an engine of
// the host alone, whose description has it too.
inline kvf_engine make_engine_without_cuda(const char *why) {
    kvf_engine_options options = KVF_ENGINE_OPTIONS_INIT;
    char error[512] = "";
    options.error = error;
    options.error_size = sizeof error;
    options.devices = KVF_DEVICES_CUDA;
    kvf_engine engine = 0;
    CHECK_STATUS(KVF_ERR_NO_DEVICE, kvf_engine_create(&options, &engine));
    if (!strstr(error, why)) fprintf(stderr, "\"%s\" lacks \"%s\"\n", error, why);
    CHECK(strstr(error, why) && engine == 0);

    options.devices = KVF_DEVICES_AUTO;
    CHECK_OK(kvf_engine_create(&options, &engine));
    char json[4096];
    CHECK_OK(kvf_engine_describe(engine, json, sizeof json, nullptr));
    CHECK(strstr(json, why) && !strstr(json, "\"kind\": \"cuda\""));
    return engine;
}

// Foreign: pinned by the program itself, past kvferry.
enum class Kind { Pool, Registered, Foreign, Pageable };
constexpr Kind kKinds[] = {Kind::Pool, Kind::Registered, Kind::Foreign, Kind::Pageable};

// A caller's buffer that begins `shift` bytes after a page's beginning.
class Buffer {
public:
    Buffer(kvf_engine engine, Kind kind, uint64_t bytes, uint64_t shift = 0)
        : engine_(engine), kind_(kind), bytes_(bytes), mapped_(bytes + shift + 1) {
        if (kind == Kind::Pool) {
            CHECK_OK(kvf_buffer_alloc(engine, mapped_, &memory_));
        } else if (kind == Kind::Foreign) {
            CHECK_CUDA(driver().cuMemHostAlloc(&memory_, mapped_, CU_MEMHOSTALLOC_PORTABLE));
        } else {
            memory_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            CHECK(memory_ != MAP_FAILED);
        }
        data_ = static_cast<unsigned char *>(memory_) + shift;
        if (kind == Kind::Registered) CHECK_OK(kvf_buffer_register(engine, data_, bytes_ + 1));
    }
    ~Buffer() {
        if (kind_ == Kind::Pool) {
            CHECK_OK(kvf_buffer_free(memory_));
            return;
        }
        if (kind_ == Kind::Foreign) {
            CHECK_CUDA(driver().cuMemFreeHost(memory_));
            return;
        }
        if (kind_ == Kind::Registered) CHECK_OK(kvf_buffer_unregister(engine_, data_));
        munmap(memory_, mapped_);
    }
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;

    unsigned char *data() const { return data_; }
    uint64_t bytes() const { return bytes_; }
    std::span<unsigned char> span() const { return {data_, bytes_}; }
    void fill(unsigned char value) const { memset(data_, value, bytes_); }
    void fill(const Bytes &content) const { std::copy(content.begin(), content.end(), data_); }
    bool holds(const Bytes &content) const {
        return content.size() == bytes_ && std::equal(content.begin(), content.end(), data_);
    }

private:
    const kvf_engine engine_;
    const Kind kind_;
    const uint64_t bytes_, mapped_;
    void *memory_ = nullptr;
    unsigned char *data_ = nullptr;
};

enum class Way { Save, Load };

using Regions = std::vector<kvf_region>;

inline kvf_job start(kvf_engine engine, Way way, const Regions &regions, const Buffer &buffer,
                     const kvf_submit_options &given) {
    kvf_submit_options options = given;
    char error[256] = "";
    if (!options.error) {
        options.error = error;
        options.error_size = sizeof error;
    }
    kvf_job job = 0;
    const int32_t status = way == Way::Save
                               ? kvf_regions_save(engine, regions.data(), regions.size(),
                                                  buffer.data(), buffer.bytes(), &options, &job)
                               : kvf_regions_load(engine, regions.data(), regions.size(),
                                                  buffer.data(), buffer.bytes(), &options, &job);
    if (status != KVF_OK) fprintf(stderr, "%s\n", options.error);
    CHECK_OK(status);
    return job;
}

inline kvf_job start(kvf_engine engine, Way way, const Regions &regions, const Buffer &buffer,
                     uint32_t priority = KVF_PRIORITY_URGENT) {
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.priority = priority;
    return start(engine, way, regions, buffer, options);
}

inline kvf_completion finish(kvf_job job) {
    kvf_completion completion;
    CHECK_OK(kvf_job_wait(job, 60 * SECONDS, &completion, sizeof completion));
    CHECK_OK(kvf_job_release(job));
    return completion;
}

// As finish(), for a job that must end well.
inline kvf_completion succeed(kvf_job job) {
    const kvf_completion completion = finish(job);
    if (completion.status != KVF_OK) fprintf(stderr, "%s\n", completion.detail);
    CHECK_OK(completion.status);
    return completion;
}

inline bool has_ended(kvf_job job) { return kvf_job_poll(job, nullptr, 0) == 1; }

// ---- Random regions, and what their transfer must do --------------------------------------------

using Random = std::mt19937_64;

inline uint64_t between(Random &random, uint64_t least, uint64_t most) {
    return std::uniform_int_distribution<uint64_t>(least, most)(random);
}

inline Bytes random_bytes(Random &random, uint64_t bytes) {
    Bytes content((bytes + 7) / 8 * 8);
    for (uint64_t i = 0; i < content.size(); i += 8) {
        const uint64_t word = random();
        memcpy(&content[i], &word, sizeof word);
    }
    content.resize(bytes);
    return content;
}

// How regions lie in memory. Cells: rows of 2 KiB of one cell each, as a cache of several sequences
// has.
enum class Style { Runs, CellsInTurn, CellsAtRandom, Blocks, Narrow, Long, Mixed };
constexpr Style kStyles[] = {Style::Runs,   Style::CellsInTurn, Style::CellsAtRandom, Style::Blocks,
                             Style::Narrow, Style::Long,        Style::Mixed};

struct Plan {
    Regions regions; // addresses from 0 on, in [0, room)
    uint64_t buffer_bytes = 0;

    Regions at(uint64_t address) const {
        Regions moved = regions;
        for (kvf_region &region : moved) region.address += address;
        return moved;
    }
};

inline Plan make_plan(Random &random, Style style, uint64_t room, uint64_t most_regions = 3000) {
    Plan plan;
    uint64_t at = between(random, 0, 63);
    plan.buffer_bytes = between(random, 0, 63);
    while (plan.regions.size() < most_regions) {
        Style one = style;
        if (style == Style::Mixed) one = kStyles[between(random, 0, 5)];
        kvf_region region{};
        region.rows = 1;
        uint64_t gap = between(random, 0, 3000);
        switch (one) {
        case Style::Runs: region.width = between(random, 1, 5000); break;
        case Style::CellsInTurn:
            region.width = 2048;
            gap = 3 * 2048;
            break;
        case Style::CellsAtRandom:
            region.width = 2048;
            gap = between(random, 1, 3) * 2048;
            break;
        case Style::Blocks:
            region.width = between(random, 1024, std::min<uint64_t>(room / 10, 200'000));
            region.rows = between(random, 2, 40);
            region.pitch = region.width + between(random, 0, 5000);
            break;
        case Style::Narrow:
            region.width = between(random, 1, 600);
            region.rows = between(random, 2, 3000);
            region.pitch = region.width + between(random, 0, 100);
            break;
        case Style::Long: region.width = between(random, 64 * KiB, room / 3); break;
        case Style::Mixed: break;
        }
        const uint64_t span = (region.rows - 1) * region.pitch + region.width;
        if (at + gap + span > room) {
            if (plan.regions.empty()) continue;
            break;
        }
        region.address = at + gap;
        at = region.address + span;
        region.buffer_pitch = region.width;
        if (region.rows > 1 && between(random, 0, 2) == 0) {
            region.buffer_pitch += between(random, 1, 50);
        }
        if (between(random, 0, 4) == 0) plan.buffer_bytes += between(random, 0, 20);
        region.offset = plan.buffer_bytes;
        plan.buffer_bytes += (region.rows - 1) * region.buffer_pitch + region.width;
        plan.regions.push_back(region);
    }
    return plan;
}

// Moves the plan's rows between `memory`, which its addresses index, and `buffer`.
inline void model(const Plan &plan, Way way, std::span<unsigned char> memory,
                  std::span<unsigned char> buffer) {
    for (const kvf_region &r : plan.regions) {
        for (uint64_t row = 0; row < r.rows; ++row) {
            unsigned char *in_memory = &memory[r.address + row * r.pitch];
            unsigned char *in_buffer = &buffer[r.offset + row * r.buffer_pitch];
            if (way == Way::Save) {
                std::copy_n(in_memory, r.width, in_buffer);
            } else {
                std::copy_n(in_buffer, r.width, in_memory);
            }
        }
    }
}

// Saves the plan's rows of `device`, which holds `memory`, and checks the whole buffer.
inline kvf_completion save_and_check(kvf_engine engine, const Plan &plan,
                                     const DeviceMemory &device, Bytes &memory,
                                     const Buffer &buffer,
                                     uint32_t priority = KVF_PRIORITY_URGENT) {
    Bytes expected(plan.buffer_bytes, 0xAA);
    buffer.fill(0xAA);
    model(plan, Way::Save, memory, expected);
    const kvf_completion completion =
        succeed(start(engine, Way::Save, plan.at(device.address()), buffer, priority));
    CHECK(buffer.holds(expected));
    return completion;
}

// Loads random bytes into the plan's rows of `device`, which holds `memory`, and checks the whole
// of it.
inline void load_and_check(kvf_engine engine, const Plan &plan, const DeviceMemory &device,
                           Bytes &memory, const Buffer &buffer, Random &random,
                           uint32_t priority = KVF_PRIORITY_URGENT) {
    Bytes content = random_bytes(random, plan.buffer_bytes);
    buffer.fill(content);
    model(plan, Way::Load, memory, content);
    succeed(start(engine, Way::Load, plan.at(device.address()), buffer, priority));
    CHECK(device.read() == memory);
    CHECK(buffer.holds(content));
}
