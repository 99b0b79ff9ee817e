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
// Waking a thread costs several times what copying this much does (measured: 12 us a job against 4 us).
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
    workers_.reserve(threads_ + 1); // a thread that has been started must find its place
    while (workers_.size() <= threads_) {
        const bool background = workers_.empty();
        workers_.push_back(start_thread([this, background] { work(background); }));
    }
}

void HostDevice::submit(Leg &leg) {
    if (leg.parts.is_closed() && leg.parts.bytes() <= kCopyAtOnce && !leg.job->gate()) {
        Job &job = *leg.job;
        const uint64_t begin_ns = now_ns();
        job.note_started(begin_ns);
        while (!leg.parts.empty() && !job.stopping()) {
            copy_piece(leg.parts.next(kUrgentPiece, kRunsPerPiece), job.request.buffer,
                       job.request.direction);
        }
        owner_.trace(job, begin_ns, now_ns(), leg.parts.bytes(), index);
        job.leg_ended(leg);
        return;
    }
    bool ended = false;
    {
        std::lock_guard lock(mutex_);
        if (workers_.size() <= threads_) start_threads();
        schedule_.add(leg);
        // A job that was asked to stop before its leg came was not found then.
        if (leg.job->stopping()) ended = schedule_.cut_short(leg);
        wake(leg.job->request.priority, leg.parts.bytes());
    }
    if (ended) leg.job->leg_ended(leg);
}

void HostDevice::extend(Leg &leg, Layout &&part) {
    std::lock_guard lock(mutex_);
    const uint64_t bytes = part.bytes;
    if (schedule_.extend(leg, std::move(part))) wake(leg.job->request.priority, bytes);
}

void HostDevice::finish(Leg &leg) {
    {
        std::lock_guard lock(mutex_);
        if (!schedule_.finish(leg)) return;
    }
    leg.job->leg_ended(leg);
}

// There is so much more to copy.
void HostDevice::wake(uint32_t priority, uint64_t bytes) {
    if (priority == KVF_PRIORITY_BACKGROUND) {
        background_work_.notify_one();
    } else if (bytes > kUrgentPiece) {
        urgent_work_.notify_all(); // everybody may help with a long one
    } else {
        urgent_work_.notify_one();
    }
}

void HostDevice::cut_short(Leg &leg) {
    {
        std::lock_guard lock(mutex_);
        const bool ended = schedule_.cut_short(leg);
        background_work_.notify_one(); // it may have been held back by this leg
        if (!ended) return;
    }
    leg.job->leg_ended(leg);
}

void HostDevice::cut_short_stopping() {
    LegList ended;
    {
        std::lock_guard lock(mutex_);
        schedule_.cut_short_stopping(ended);
        background_work_.notify_one(); // as above
    }
    for (const auto &[arrival, leg] : ended) leg->job->leg_ended(*leg);
}

// Asks some of the streams that legs follow whether they are done. Without the lock, which is held before and after:
// nobody who submits or cancels shall wait for it. True if all of them have been asked by now.
bool HostDevice::ask_gates(std::unique_lock<std::mutex> &lock, uint32_t priority) {
    GateCheck check;
    const bool all = schedule_.next_gates(priority, check);
    lock.unlock();
    check.run();
    lock.lock();
    // Several may have become ready: they are everybody's.
    if (schedule_.admit(priority, check) && priority == KVF_PRIORITY_URGENT) {
        urgent_work_.notify_all();
    }
    return all;
}

void HostDevice::work(bool background) {
    name_thread("kvf-host");
    if (background) {
        setpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)), kBackgroundNice);
    }
    const uint32_t priority = background ? KVF_PRIORITY_BACKGROUND : KVF_PRIORITY_URGENT;
    std::condition_variable &arrived = background ? background_work_ : urgent_work_;

    auto ask_again = std::chrono::steady_clock::now();
    std::unique_lock lock(mutex_);
    for (;;) {
        // A job that follows a stream announces nothing when its turn has come: the stream is asked again and again,
        // beside other work too.
        bool all_asked = true;
        if (schedule_.has_following(priority) && std::chrono::steady_clock::now() >= ask_again) {
            all_asked = ask_gates(lock, priority);
            if (all_asked) ask_again = std::chrono::steady_clock::now() + kGatePoll;
        }
        // Background work waits while there is anything urgent to copy.
        const bool held_back = background && schedule_.front(KVF_PRIORITY_URGENT);
        Leg *leg = held_back ? nullptr : schedule_.front(priority);
        if (!leg) {
            if (stopping_) return;
            if (held_back || !schedule_.has_following(priority)) {
                arrived.wait(lock);
            } else if (all_asked) {
                arrived.wait_until(lock, ask_again);
            }
            continue;
        }
        Piece piece;
        schedule_.take(*leg, [&] {
            piece = leg->parts.next(background ? kBackgroundPiece : kUrgentPiece, kRunsPerPiece);
        });
        if (!background && !schedule_.front(KVF_PRIORITY_URGENT)) background_work_.notify_one();
        Job &job = *leg->job;
        lock.unlock();

        const uint64_t begin_ns = now_ns();
        job.note_started(begin_ns);
        if (!job.stopping()) {
            copy_piece(piece, job.request.buffer, job.request.direction);
            owner_.trace(job, begin_ns, now_ns(), piece.bytes, index);
        }

        lock.lock();
        if (schedule_.piece_ended(*leg)) {
            lock.unlock();
            job.leg_ended(*leg);
            lock.lock();
        }
    }
}

// The buffer is as near as any other host memory: one copy is the whole save.
Device::Snapshot HostDevice::snapshot(const Layout &layout, unsigned char *buffer) {
    Cursor cursor(layout);
    while (!cursor.at_end()) {
        copy_piece(cursor.next(kUrgentPiece, kRunsPerPiece), buffer, Direction::Save);
    }
    return {};
}

void HostDevice::stop() {
    {
        std::lock_guard lock(mutex_);
        stopping_ = true;
        urgent_work_.notify_all();
        background_work_.notify_all();
    }
    for (auto &worker : workers_) worker.join();
    workers_.clear();
}

} // namespace kvf
