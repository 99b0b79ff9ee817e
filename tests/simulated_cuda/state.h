// What the simulated driver consists of. One mutex guards all of it; bytes are moved outside of it.
#pragma once

#include <array>
#include <atomic>
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
constexpr int kDirections = 3; // KVFSIM_SAVE, _LOAD, _DEVICE

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

// The end of an operation, for all who wait for it.
struct Completion {
    bool done = false;
    uint64_t time_ns = 0;
};
using CompletionPtr = std::shared_ptr<Completion>;

struct Range {
    uint64_t address = 0;
    uint64_t bytes = 0;

    uint64_t end() const { return address + bytes; }
    bool holds(uint64_t other, uint64_t size) const {
        return other >= address && size <= bytes && other - address <= bytes - size;
    }
    bool meets(const Range &other) const { return address < other.end() && other.address < end(); }
};

enum class Kind { Copy, Kernel, Other };

struct Operation {
    Kind kind = Kind::Other;
    std::function<CUresult()> run;    // without the lock; empty: nothing to do
    std::function<bool()> ready;      // with the lock, asked again and again; empty: at once
    std::vector<CompletionPtr> after; // of other streams
    CompletionPtr completion = std::make_shared<Completion>();
    std::vector<Range> uses; // memory it names
    uint64_t bytes = 0;
    int device = -1; // of a copy's lane; -1: of none
    int direction = 0;
};

struct Context;

struct Stream {
    std::shared_ptr<Context> context;
    bool blocking = false; // waits for the legacy stream, and it for this one
    bool closing = false;
    CUstreamCaptureStatus capture = CU_STREAM_CAPTURE_STATUS_NONE;
    std::deque<Operation> queue; // the first one is being executed
    CompletionPtr last;          // of the operation submitted last
    std::condition_variable wake;
};
using StreamPtr = std::shared_ptr<Stream>;

struct Event {
    std::shared_ptr<Context> context;
    unsigned int flags = 0;
    CompletionPtr record; // none: never recorded
    StreamPtr captured;   // recorded into a capture of this stream, and not executed
};
using EventPtr = std::shared_ptr<Event>;

struct Module {
    std::shared_ptr<Context> context;
    std::vector<std::string> entries;
    std::vector<CUfunction> functions;
};

struct Function {
    std::shared_ptr<Context> context;
    std::string name;
};

// Of one device; while it is retained.
struct Context {
    CUcontext handle = nullptr;
    int device = 0;
    uint64_t retained = 0;
    CUresult error = CUDA_SUCCESS; // sticky
    StreamPtr legacy;
    std::vector<StreamPtr> streams; // all, the legacy one too, until their threads have ended
};
using ContextPtr = std::shared_ptr<Context>;

struct Allocation {
    Range range;
    ContextPtr context;
    uint64_t id = 0;
    bool on_device = false;
    bool registered = false; // host memory: by cuMemHostRegister()
    bool ordered = false;    // device memory: by cuMemAllocAsync()
};

// A device's memory: the same pages at two places. The public one cannot be accessed.
struct Arena {
    int file = -1;
    uint64_t address = 0;
    uint64_t bytes = 0;
    std::byte *alias = nullptr;
    uint64_t next =
        0; // where the search for free addresses begins: late reuse finds stale pointers
    uint64_t allocated = 0; // bytes asked for
};

// The lane of a device in a direction: one copy at a time, first come, first served.
struct Lane {
    std::deque<const Operation *> queue;
    uint64_t queued = 0; // submitted and not ended
    uint64_t peak = 0;
};

// A fault or hold, for the `left`-th time from now.
struct Rule {
    std::string what;
    uint64_t left = 1;
    int error = 0;
    bool forever = false;
    bool hold = false;
};

struct Driver {
    std::mutex mutex;
    std::condition_variable progress; // something has ended, failed or been released

    Settings settings;
    Counters counters;
    std::array<std::atomic<uint64_t>, kEntryPoints> calls{};
    std::vector<Rule> rules;
    std::atomic<uint64_t> rule_count{0};
    uint64_t released = 0; // how often kvfsim_release() was called
    std::array<CUresult, kDevices> lost{};
    std::atomic<bool> capturing{false};
    std::atomic<bool> initialized{false};
    std::atomic<bool> forked{false};

    uint64_t next_handle = 0x1000;
    uint64_t next_buffer = 1;
    std::array<ContextPtr, kDevices> primary;
    std::unordered_map<CUcontext, ContextPtr> contexts;
    std::unordered_map<CUstream, StreamPtr> streams;
    std::unordered_map<CUevent, EventPtr> events;
    std::unordered_map<CUmodule, std::shared_ptr<Module>> modules;
    std::unordered_map<CUfunction, Function> functions;

    std::array<Arena, kDevices> arenas;
    std::map<uint64_t, Allocation> allocations; // by address, device and pinned host memory alike
    Lane lanes[kDevices][kDirections];

    Driver();
};

Driver &driver();
uint64_t now_ns();

template <class Handle>
Handle new_handle() {
    driver().next_handle += 16;
    return reinterpret_cast<Handle>(driver().next_handle);
}

using Lock = std::unique_lock<std::mutex>;

// ---- control.cpp --------------------------------------------------------------------------------

// Every entry point begins with it: counts the call, and returns an error that has been asked for.
CUresult enter(EntryPoint entry_point, bool needs_init, bool unsafe_in_capture);
extern thread_local CUstreamCaptureMode capture_mode;

// The error of a rule that applies to this occasion of `what` (`alias`: its other name), or 0.
CUresult injected_error(const char *what, const char *alias);
// True if this occasion is to be held.
bool injected_hold(const char *what);
// Breaks a context: its queued operations end, its calls return the error.
void break_context(Context &context, CUresult error);

// ---- memory.cpp ---------------------------------------------------------------------------------

// All with the lock.
Arena *arena_of(uint64_t address);
void open_arena(int device);
const Allocation *allocation_of(uint64_t address);
CUresult allocate_device(const ContextPtr &context, uint64_t bytes, uint64_t *address);
CUresult pin(const ContextPtr &context, Range range, bool registered);
// Frees or unregisters what begins at this address, after the operations that name it.
void release_allocation(Lock &lock, uint64_t address, bool abandoned);

// Frees device memory as a stream's turn comes to it: what still names it elsewhere is a hazard.
void free_in_order(uint64_t address);

// Without need of the lock: the memory behind an address of an arena.
std::byte *alias_of(uint64_t address);
bool is_mapped(Range range);

// Allocations as they are now, for use without the lock: those that operations name cannot be freed
// before these have ended.
class View {
public:
    View(); // with the lock
    // Usable memory behind an address, or nullptr.
    std::byte *device(uint64_t address, uint64_t bytes, int device);
    std::byte *kernel(uint64_t address, uint64_t bytes, int device); // device or pinned memory
    std::byte *any(uint64_t address, uint64_t bytes);                // pageable memory too

private:
    struct Part {
        Range range;
        int device; // -1: pinned host memory
    };
    const Part *find(uint64_t address, uint64_t bytes);
    std::vector<Part> parts_;
    const Part *recent_ = nullptr;
};

// ---- stream.cpp ---------------------------------------------------------------------------------

// All with the lock.
StreamPtr new_stream(const ContextPtr &context, bool blocking);
StreamPtr legacy_stream(const ContextPtr &context);
// Queues it behind what the stream has. Returns its completion. What a stream is given while it is
// captured is never executed, and counts as done.
CompletionPtr submit(const StreamPtr &stream, Operation operation);
// An operation that a capture does not allow: a stream that is being captured will not give a
// graph.
void invalidate_capture(Stream &stream);
bool is_captured(const Stream &stream);
// Whether the legacy stream would have to wait for a stream that is being captured.
bool meets_capture(const Context &context, const Stream &stream);
void wait_for(Lock &lock, const CompletionPtr &completion);
void wait_for_context(Lock &lock, const Context &context);
// Lets its thread end after what is queued.
void close_stream(Stream &stream);
void wait_for_uses(Lock &lock, Range range, const Context *context);
bool is_used(Range range);

} // namespace simulated
