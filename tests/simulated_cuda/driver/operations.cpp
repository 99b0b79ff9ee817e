#include "operations.h"

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

#include "capture.h"
#include "contexts.h"
#include "faults.h"

namespace simulated {
namespace {

using Clock = std::chrono::steady_clock;

// Returns how long an operation takes, by the settings.
std::chrono::nanoseconds duration_of(const Operation &operation) {
    const Settings &s = driver().settings;
    if (operation.kind == Kind::Other) return std::chrono::nanoseconds(0);
    double seconds = static_cast<double>(s.latency_us) * 1e-6;
    const bool link = operation.device >= 0 && operation.direction != KVFSIM_DEVICE;
    if (link && s.bytes_per_second)
        seconds += static_cast<double>(operation.bytes) / static_cast<double>(s.bytes_per_second);
    return std::chrono::nanoseconds(static_cast<int64_t>(seconds * 1e9));
}

// Returns the name that rules have for operations of this kind, or NULL.
const char *name_of(Kind kind) {
    switch (kind) {
    case Kind::Copy: return "copy";
    case Kind::Kernel: return "kernel";
    case Kind::Other: break;
    }
    return nullptr;
}

// Waits while the operation is held.
void pass_hold(Lock &lock, const Context &context, const char *what) {
    Driver &d = driver();
    if (!injected_hold(what)) return;
    const uint64_t released = d.released;
    ++d.counters.held;
    d.progress.notify_all();
    d.progress.wait(lock, [&] { return d.released != released || context.error; });
    --d.counters.held;
}

void count_executed(const Operation &operation) {
    Counters &c = driver().counters;
    if (operation.kind == Kind::Kernel) ++c.kernels;
    if (operation.kind != Kind::Copy || operation.device < 0) return;
    uint64_t *copies[] = {&c.copies_save, &c.copies_load, &c.copies_device};
    uint64_t *bytes[] = {&c.bytes_save, &c.bytes_load, &c.bytes_device};
    ++*copies[operation.direction];
    *bytes[operation.direction] += operation.bytes;
}

// Executes an operation, without the mutex while the operation runs. Returns the operation's error,
// or the context's.
CUresult execute(Lock &lock, const Context &context, Operation &operation) {
    Driver &d = driver();
    while (operation.ready && !context.error && !operation.ready())
        d.progress.wait_for(lock, std::chrono::microseconds(50));

    const char *what = name_of(operation.kind);
    if (what && !context.error) {
        pass_hold(lock, context, what);
        if (CUresult error = injected_error(what, what)) return error;
    }

    Lane *lane = operation.device >= 0 ? &d.lanes[operation.device][operation.direction] : nullptr;
    if (lane) {
        lane->queue.push_back(&operation);
        d.progress.wait(lock, [&] { return lane->queue.front() == &operation || context.error; });
    }
    CUresult result = context.error;
    if (!result && operation.run) {
        const auto end = Clock::now() + duration_of(operation);
        lock.unlock();
        result = operation.run();
        lock.lock();
        while (!context.error && Clock::now() < end) d.progress.wait_until(lock, end);
        if (!result) count_executed(operation);
    }
    if (lane) std::erase(lane->queue, &operation);
    return result;
}

// The function of a stream's thread, which ends when the stream is closed and empty.
void execute_queue(const StreamPtr &stream) {
    Driver &d = driver();
    Context &context = *stream->context;
    Lock lock(d.mutex);
    for (;;) {
        stream->wake.wait(lock, [&] { return !stream->queue.empty() || stream->closing; });
        if (stream->queue.empty()) break;
        Operation &operation = stream->queue.front();
        d.progress.wait(lock, [&] {
            return context.error || std::all_of(operation.after.begin(), operation.after.end(),
                                                [](const auto &other) { return other->done; });
        });
        if (CUresult result = execute(lock, context, operation)) break_context(context, result);
        if (operation.device >= 0) --d.lanes[operation.device][operation.direction].queued;
        operation.completion->time_ns = now_ns();
        operation.completion->done = true;
        stream->queue.pop_front();
        d.progress.notify_all();
    }
    std::erase(context.streams, stream);
    d.progress.notify_all();
}

template <class Function>
bool any_operation(Function function) {
    for (const ContextPtr &context : driver().primary)
        if (context)
            for (const StreamPtr &stream : context->streams)
                for (const Operation &operation : stream->queue)
                    if (function(*context, operation)) return true;
    return false;
}

bool names(const Operation &operation, Range range) {
    return std::any_of(operation.uses.begin(), operation.uses.end(),
                       [&](const Range &use) { return use.meets(range); });
}

} // namespace

StreamPtr new_stream(const ContextPtr &context, bool blocking) {
    auto stream = std::make_shared<Stream>();
    stream->context = context;
    stream->blocking = blocking;
    context->streams.push_back(stream);
    std::thread(execute_queue, stream).detach();
    return stream;
}

StreamPtr legacy_stream(const ContextPtr &context) {
    if (!context->legacy) context->legacy = new_stream(context, false);
    return context->legacy;
}

CompletionPtr submit(const StreamPtr &stream, Operation operation) {
    Driver &d = driver();
    const Context &context = *stream->context;
    if (is_captured(*stream)) {
        operation.completion->done = true;
        return operation.completion;
    }
    if (stream == context.legacy) {
        for (const StreamPtr &other : context.streams)
            if (other->blocking && other->last) operation.after.push_back(other->last);
    } else if (stream->blocking && context.legacy && context.legacy->last) {
        operation.after.push_back(context.legacy->last);
    }
    if (operation.device >= 0) {
        Lane &lane = d.lanes[operation.device][operation.direction];
        lane.peak = std::max(lane.peak, ++lane.queued);
    }
    CompletionPtr completion = operation.completion;
    stream->last = completion;
    stream->queue.push_back(std::move(operation));
    stream->wake.notify_one();
    return completion;
}

void wait_for(Lock &lock, const CompletionPtr &completion) {
    if (completion) driver().progress.wait(lock, [&] { return completion->done; });
}

void wait_for_context(Lock &lock, const Context &context) {
    driver().progress.wait(lock, [&] {
        return std::all_of(context.streams.begin(), context.streams.end(),
                           [](const StreamPtr &stream) { return stream->queue.empty(); });
    });
}

void close_stream(Stream &stream) {
    stream.closing = true;
    stream.wake.notify_one();
}

bool is_used(Range range) {
    return any_operation([&](const Context &in, const Operation &operation) {
        return !in.error && names(operation, range);
    });
}

void wait_for_uses(Lock &lock, Range range, const Context *context) {
    driver().progress.wait(lock, [&] {
        return !any_operation([&](const Context &in, const Operation &operation) {
            return &in == context || operation.kind == Kind::Kernel || names(operation, range);
        });
    });
}

} // namespace simulated
