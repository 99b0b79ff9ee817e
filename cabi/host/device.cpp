#include "host/device.h"

#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>

#include "core/thread.h"
#include "memory/copy.h"

namespace kvf {
namespace {

// Small enough that a cancelled or overtaken job stops within a millisecond at memory speed.
constexpr uint64_t kUrgentPiece = 4 << 20;
// A background job leaves the memory bus to others between pieces of this size.
constexpr uint64_t kBackgroundPiece = 512 << 10;
constexpr uint64_t kRunsPerPiece = 4096;
// The background thread's nice value: a decoding thread that wants the core gets nine tenths of it
// (sched(7): each step of nice is worth a factor of 1.25).
constexpr int kBackgroundNice = 10;
constexpr std::chrono::microseconds kGatePoll{50};
// Waking a thread costs several times what copying this much does (measured: 12 us a job against 4
// us).
constexpr uint64_t kCopyAtOnce = 16 << 10;

} // namespace

HostDevice::HostDevice(JobOwner &owner, uint32_t threads)
    : Device(kHost), owner_(owner),
      threads_(threads ? threads : std::clamp(std::thread::hardware_concurrency(), 1u, 4u)) {}

std::string HostDevice::describe() const {
    return format("{\"kind\": \"host\", \"name\": \"host memory\", \"copy_threads\": %u}",
                  threads_);
}

void HostDevice::start_threads() {
    // Goes on where it stopped if the system refused a thread the last time.
    workers_.reserve(threads_ + 1); // no thread that was started may be lost for want of memory
    while (workers_.size() <= threads_) {
        const uint32_t priority = workers_.empty() ? KVF_PRIORITY_BACKGROUND : KVF_PRIORITY_URGENT;
        workers_.push_back(start_thread([this, priority] { work(priority); }));
    }
}

void HostDevice::submit(Leg &leg) {
    if (leg.parts.is_closed() && leg.parts.bytes() <= kCopyAtOnce && !leg.job->gate()) {
        copy_at_once(leg);
        return;
    }
    schedule_.add(
        leg,
        [this] {
            if (workers_.size() <= threads_) start_threads();
        },
        [&] { wake(leg.job->request.priority, leg.parts.bytes()); });
}

void HostDevice::copy_at_once(Leg &leg) {
    Job &job = *leg.job;
    const uint64_t begin_ns = now_ns();
    job.note_started(begin_ns);
    while (!leg.parts.empty() && !job.stopping()) {
        const Piece piece = leg.parts.next(kUrgentPiece, kRunsPerPiece);
        copy_piece(piece, job.request.buffer, job.request.direction);
        job.moved({&piece, 1});
    }
    owner_.trace(job, begin_ns, now_ns(), leg.parts.bytes(), index);
    job.leg_ended(leg);
}

void HostDevice::extend(Leg &leg, Layout &&part) {
    const auto lock = schedule_.lock();
    const uint64_t bytes = part.bytes;
    if (schedule_.legs().extend(leg, std::move(part))) wake(leg.job->request.priority, bytes);
}

void HostDevice::close(Leg &leg) { schedule_.close(leg); }

// There are `bytes` more to copy.
void HostDevice::wake(uint32_t priority, uint64_t bytes) {
    if (priority == KVF_PRIORITY_URGENT && bytes > kUrgentPiece) {
        urgent_work_.notify_all(); // every thread may help with several pieces
    } else {
        work_of(priority).notify_one();
    }
}

// What is cut short may have held background work back.
void HostDevice::cut_short(Leg &leg) {
    schedule_.cut_short(leg, [this] { background_work_.notify_one(); });
}

void HostDevice::cut_short_stopping() {
    schedule_.cut_short_stopping([this] { background_work_.notify_one(); });
}

void HostDevice::work(uint32_t priority) {
    name_thread("kvf-host");
    if (priority == KVF_PRIORITY_BACKGROUND) {
        setpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)), kBackgroundNice);
    }
    auto ask_again = std::chrono::steady_clock::now();
    std::unique_lock lock = schedule_.lock();
    Schedule &legs = schedule_.legs();
    for (;;) {
        // A stream that a job follows does not tell when it is done. It is asked again and again,
        // beside other work too.
        bool all_asked = true;
        if (legs.has_following(priority) && std::chrono::steady_clock::now() >= ask_again) {
            all_asked = ask_gates(lock, priority);
            if (all_asked) ask_again = std::chrono::steady_clock::now() + kGatePoll;
        }
        const bool held_back = is_held_back(priority);
        if (Leg *leg = held_back ? nullptr : legs.front(priority)) {
            move_piece(lock, *leg);
            continue;
        }
        if (stopping_) return;
        if (held_back || !legs.has_following(priority)) {
            work_of(priority).wait(lock);
        } else if (all_asked) {
            work_of(priority).wait_until(lock, ask_again);
        }
    }
}

// Background work waits while there is anything urgent to copy.
bool HostDevice::is_held_back(uint32_t priority) {
    return priority == KVF_PRIORITY_BACKGROUND && schedule_.legs().front(KVF_PRIORITY_URGENT);
}

// Asks some of the streams that legs follow whether they are done. Unlocks meanwhile: nobody who
// submits or cancels may have to wait for that. True if all of them have been asked by now.
bool HostDevice::ask_gates(std::unique_lock<std::mutex> &lock, uint32_t priority) {
    GateCheck check;
    const bool all = schedule_.legs().next_gates(priority, check);
    lock.unlock();
    check.run();
    lock.lock();
    // Several legs may have become ready, and every thread may move them.
    if (schedule_.legs().admit(priority, check) && priority == KVF_PRIORITY_URGENT) {
        urgent_work_.notify_all();
    }
    return all;
}

// Copies the next piece of a leg. Unlocks meanwhile.
void HostDevice::move_piece(std::unique_lock<std::mutex> &lock, Leg &leg) {
    Job &job = *leg.job;
    const bool background = job.request.priority == KVF_PRIORITY_BACKGROUND;
    Piece piece;
    schedule_.legs().take(leg, [&] {
        piece = leg.parts.next(background ? kBackgroundPiece : kUrgentPiece, kRunsPerPiece);
    });
    if (!background && !schedule_.legs().front(KVF_PRIORITY_URGENT)) background_work_.notify_one();
    lock.unlock();
    const uint64_t begin_ns = now_ns();
    job.note_started(begin_ns);
    if (!job.stopping()) {
        copy_piece(piece, job.request.buffer, job.request.direction);
        owner_.trace(job, begin_ns, now_ns(), piece.bytes, index);
        job.moved({&piece, 1});
    }
    schedule_.piece_ended(leg);
    lock.lock();
}

// The buffer is host memory, too: one copy is the whole save.
Device::Snapshot HostDevice::snapshot(const Layout &layout, unsigned char *buffer) {
    Cursor cursor(layout);
    while (!cursor.at_end()) {
        copy_piece(cursor.next(kUrgentPiece, kRunsPerPiece), buffer, Direction::Save);
    }
    return {};
}

void HostDevice::stop() {
    {
        const auto lock = schedule_.lock();
        stopping_ = true;
        urgent_work_.notify_all();
        background_work_.notify_all();
    }
    for (auto &worker : workers_) worker.join();
    workers_.clear();
}

} // namespace kvf
