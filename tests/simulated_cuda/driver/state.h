// The state of the simulated driver: one object, which one mutex guards. Bytes are moved without
// the mutex.
#pragma once

#include <array>
#include <atomic>
#include <climits>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda/driver_api.h"
#include "simulated_cuda.h"

namespace simulated {

constexpr int kDevices = 8;
constexpr int kDirections = 3; // KVFSIM_SAVE, KVFSIM_LOAD, KVFSIM_DEVICE
// The largest pitch of a two-dimensional copy.
constexpr int kMaxPitch = INT_MAX;

enum EntryPoint {
#define ENTRY_POINT(name, symbol, parameters) k_##symbol,
    CUDA_DRIVER_ENTRY_POINTS(ENTRY_POINT)
#undef ENTRY_POINT
        kEntryPoints
};

struct Settings {
#define SETTING(name, value, text) uint64_t name = value;
    KVFSIM_SETTINGS(SETTING)
#undef SETTING
};

struct Counters {
#define COUNTER(name, text) uint64_t name = 0;
    KVFSIM_COUNTERS(COUNTER)
#undef COUNTER
};

// A range of addresses.
struct Range {
    uint64_t address = 0;
    uint64_t bytes = 0;

    uint64_t end() const { return address + bytes; }
    bool holds(uint64_t other, uint64_t size) const {
        return other >= address && size <= bytes && other - address <= bytes - size;
    }
    bool meets(const Range &other) const { return address < other.end() && other.address < end(); }
};

// ---- Contexts, streams, events, modules ---------------------------------------------------------

// Tells whether an operation has ended. The operation and all who wait for it share one.
struct Completion {
    bool done = false;
    // When it ended, by now_ns().
    uint64_t time_ns = 0;
};
using CompletionPtr = std::shared_ptr<Completion>;

enum class Kind { Copy, Kernel, Other };

// Something that a stream executes.
struct Operation {
    Kind kind = Kind::Other;
    // Does the work, without the mutex. Empty: there is nothing to do.
    std::function<CUresult()> run;
    // Whether the operation may begin: called with the mutex until it returns true. Empty: it may.
    std::function<bool()> ready;
    // Operations of other streams that must end first.
    std::vector<CompletionPtr> after;
    CompletionPtr completion = std::make_shared<Completion>();
    // The memory that the operation names.
    std::vector<Range> uses;
    uint64_t bytes = 0;
    // Where a copy queues: the lane of a device in a direction. -1: the operation uses no lane.
    int device = -1;
    int direction = 0;
};

struct Context;

struct Stream {
    std::shared_ptr<Context> context;
    // The stream and the legacy stream wait for one another.
    bool blocking = false;
    // The stream's thread ends when the queue is empty.
    bool closing = false;
    CUstreamCaptureStatus capture = CU_STREAM_CAPTURE_STATUS_NONE;
    // The first operation is being executed.
    std::deque<Operation> queue;
    // Of the operation that was submitted last.
    CompletionPtr last;
    std::condition_variable wake;
};
using StreamPtr = std::shared_ptr<Stream>;

struct Event {
    std::shared_ptr<Context> context;
    unsigned int flags = 0;
    // Of the latest cuEventRecord(); NULL: the event has not been recorded.
    CompletionPtr record;
    // The stream that was being captured when the event was recorded in it, or NULL. Such a record
    // is not executed.
    StreamPtr captured;
};
using EventPtr = std::shared_ptr<Event>;

struct Module {
    std::shared_ptr<Context> context;
    // The names of the kernels in the PTX text.
    std::vector<std::string> entries;
    std::vector<CUfunction> functions;
};

struct Function {
    std::shared_ptr<Context> context;
    std::string name;
};

// A device's primary context, while it is retained.
struct Context {
    CUcontext handle = nullptr;
    int device = 0;
    // How many references programs hold.
    uint64_t retained = 0;
    // The sticky error, which every later call on the context returns.
    CUresult error = CUDA_SUCCESS;
    // NULL until it is first used.
    StreamPtr legacy;
    // All streams whose threads have not ended, the legacy stream included.
    std::vector<StreamPtr> streams;
};
using ContextPtr = std::shared_ptr<Context>;

// ---- Memory -------------------------------------------------------------------------------------

// Device memory or pinned host memory.
struct Allocation {
    Range range;
    ContextPtr context;
    uint64_t id = 0;
    bool on_device = false;
    // Host memory that cuMemHostRegister() has pinned.
    bool registered = false;
    // Device memory that cuMemAllocAsync() has allocated.
    bool ordered = false;
};

// A device's memory: one file, mapped twice. Programs see addresses that cannot be accessed; the
// simulated driver reads and writes the alias.
struct Arena {
    int file = -1;
    uint64_t address = 0;
    uint64_t bytes = 0;
    std::byte *alias = nullptr;
    // Where the search for free addresses begins. Addresses are reused late, so that a stale
    // pointer is noticed.
    uint64_t next = 0;
    // The sum of what programs asked for.
    uint64_t allocated = 0;
};

// The copy engine of a device for one direction. It executes one copy at a time, first come, first
// served.
struct Lane {
    // The copies that wait for the engine, and the one that it executes.
    std::deque<const Operation *> queue;
    // How many copies have been submitted and have not ended: now, and at most.
    uint64_t queued = 0;
    uint64_t peak = 0;
};

// ---- Faults -------------------------------------------------------------------------------------

// A fault or a hold that a test has asked for.
struct Rule {
    // The name of an entry point, "copy" or "kernel".
    std::string what;
    // The rule applies to the `left`-th occasion from now.
    uint64_t left = 1;
    int error = 0;
    // The rule applies to all later occasions too.
    bool forever = false;
    bool hold = false;
};

// ---- The driver ---------------------------------------------------------------------------------

struct Driver {
    std::mutex mutex;
    // Notified when something has ended, failed or been released.
    std::condition_variable progress;

    Settings settings;
    Counters counters;
    std::array<std::atomic<uint64_t>, kEntryPoints> calls{};
    std::vector<Rule> rules;
    // The size of `rules`, for a look without the mutex.
    std::atomic<uint64_t> rule_count{0};
    // How often held operations were released.
    uint64_t released = 0;
    // The errors of devices that are lost permanently.
    std::array<CUresult, kDevices> lost{};
    std::atomic<bool> capturing{false};
    std::atomic<bool> initialized{false};
    // This process is a child of the process that called cuInit().
    std::atomic<bool> forked{false};

    uint64_t next_handle = 0x1000;
    uint64_t next_allocation_id = 1;
    std::array<ContextPtr, kDevices> primary;
    std::unordered_map<CUcontext, ContextPtr> contexts;
    std::unordered_map<CUstream, StreamPtr> streams;
    std::unordered_map<CUevent, EventPtr> events;
    std::unordered_map<CUmodule, std::shared_ptr<Module>> modules;
    std::unordered_map<CUfunction, Function> functions;

    std::array<Arena, kDevices> arenas;
    // By address.
    std::map<uint64_t, Allocation> allocations;
    Lane lanes[kDevices][kDirections];

    bool has_device(int device) const {
        return device >= 0 && static_cast<uint64_t>(device) < settings.devices;
    }
};

// Returns the state, which is never destroyed: threads of streams may outlive static destructors.
Driver &driver();

// The time of a clock that never goes backwards, in nanoseconds.
uint64_t now_ns();

using Lock = std::unique_lock<std::mutex>;

// Returns a handle that no object had before. With the mutex.
template <class Handle>
Handle new_handle() {
    driver().next_handle += 16;
    return reinterpret_cast<Handle>(driver().next_handle);
}

} // namespace simulated
