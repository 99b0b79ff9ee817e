#include "cuda/lane.h"

#include <sys/prctl.h>

#include <algorithm>
#include <new>

#include "core/thread.h"
#include "memory/copy.h"
#include "memory/idle.h"

namespace kvf {
namespace {

// For a background job the pacer says. Where it begins, and what share of the link it aims at: runs, blocks, the
// gathered. (What was best on an H200: docs/performance.md. Loads cost decoding more than saves, and reach more with less.)
constexpr uint64_t kFirstRun = 4 << 20, kFirstBlock = 6 << 20, kFirstGather = 4 << 20;
constexpr double kSavedRunShare = 0.975, kLoadedRunShare = 0.97, kRowsShare = 0.93;

// Copies in the queue: for urgent jobs so many that it never runs empty.
constexpr uint32_t kLeastQueued = 2;
constexpr uint64_t kUrgentQueuedBytes = 32 << 20;
// Slots in use for background jobs: those in the queue, and two being made ready.
constexpr uint32_t kBackgroundSlots = 4;

constexpr uint32_t kUrgentBlocks = 64, kBackgroundBlocks = 32; // of a kernel's grid
// For so long a pump stays awake for a leg that has been announced.
constexpr uint64_t kExpectNs = 500'000;
// Between two looks at streams that legs follow.
constexpr uint64_t kLeastGateSleepNs = 20'000, kMostGateSleepNs = 1'000'000;
// Shorter sleeps are not worth the risk of waking too late.
constexpr uint64_t kLeastSleepNs = 15'000;

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

} // namespace

CudaLane::CudaLane(JobOwner &owner, const CudaContext &context, const CudaKernels *kernels,
                   ThreadPool &crew, CudaLandings *landings, uint32_t device, Direction direction,
                   Limits limits)
    : owner_(owner), context_(context), driver_(context.driver()), crew_(crew), landings_(landings),
      device_(device), direction_(direction), memory_(context, kernels ? limits.staging_bytes : 0),
      planner_(direction, memory_, limits.max_pitch),
      copies_(context, kernels, direction, limits.max_pitch, planner_),
      pacers_{Pacer(direction == Direction::Save ? kSavedRunShare : kLoadedRunShare, kFirstRun),
              Pacer(kRowsShare, kFirstBlock), Pacer(kRowsShare, kFirstGather)} {
    for (size_t way = 0; way < kCudaWays; ++way) {
        pace_bytes_[way] = pacers_[way].pace().bytes;
        pace_window_[way] = pacers_[way].pace().window;
    }
    const CudaCurrent current(context_);
    try {
        for (CudaSlot &slot : slots_) {
            slot.pieces.reserve(CudaPlanner::kMostPieces); // taking pieces must not fail
            slot.places.reserve(CudaPlanner::kMostPieces);
            driver_.check(
                driver_.cuStreamCreateWithPriority(&slot.stream, CU_STREAM_NON_BLOCKING, 0),
                "cuStreamCreateWithPriority");
            driver_.check(driver_.cuEventCreate(&slot.copied, CU_EVENT_DISABLE_TIMING),
                          "cuEventCreate");
            driver_.check(driver_.cuEventCreate(&slot.finished, CU_EVENT_DISABLE_TIMING),
                          "cuEventCreate");
        }
    } catch (...) {
        for (CudaSlot &slot : slots_) release(slot);
        throw;
    }
}

CudaLane::~CudaLane() {
    stop();
    try {
        const CudaCurrent current(context_);
        for (CudaSlot &slot : slots_) release(slot);
    } catch (const Error &) {
        // The context is gone, and everything in it.
    }
}

void CudaLane::release(CudaSlot &slot) {
    if (slot.copied) driver_.cuEventDestroy(slot.copied);
    if (slot.finished) driver_.cuEventDestroy(slot.finished);
    if (slot.stream) driver_.cuStreamDestroy(slot.stream);
}

void CudaLane::submit(Leg &leg) {
    bool ended = false;
    {
        std::lock_guard lock(mutex_);
        if (broken()) {
            leg.job->fail(KVF_ERR_DEVICE_LOST, why_broken_);
        } else if (context_.lost()) {
            leg.job->fail(KVF_ERR_DEVICE_LOST, "an earlier transfer found it lost");
        } else if (!thread_.joinable()) {
            thread_ = start_thread([this] { pump(); });
        }
        schedule_.add(leg);
        // A job that was asked to stop before its leg came was not found then.
        if (leg.job->stopping()) ended = schedule_.cut_short(leg);
        ++arrivals_;
        work_.notify_one();
    }
    if (ended) leg.job->leg_ended(leg);
}

void CudaLane::extend(Leg &leg, Layout &&part) {
    std::lock_guard lock(mutex_);
    schedule_.extend(leg, std::move(part));
    ++arrivals_;
    work_.notify_one();
}

void CudaLane::finish(Leg &leg) {
    {
        std::lock_guard lock(mutex_);
        if (!schedule_.finish(leg)) return;
    }
    leg.job->leg_ended(leg);
}

// Waking the pump takes several times as long as queuing a copy: it may wake while the leg is recorded.
void CudaLane::announce() {
    std::lock_guard lock(mutex_);
    expected_until_ns_ = now_ns() + kExpectNs;
    work_.notify_one();
}

// The pump need not know: what waits behind the leg is there all the time.
void CudaLane::cut_short(Leg &leg) {
    {
        std::lock_guard lock(mutex_);
        if (!schedule_.cut_short(leg)) return;
    }
    leg.job->leg_ended(leg);
}

void CudaLane::cut_short_stopping() {
    LegList ended;
    {
        std::lock_guard lock(mutex_);
        schedule_.cut_short_stopping(ended);
    }
    for (const auto &[arrival, leg] : ended) leg->job->leg_ended(*leg);
}

void CudaLane::stop() {
    {
        std::lock_guard lock(mutex_);
        stopping_ = true;
        work_.notify_one();
    }
    if (thread_.joinable()) thread_.join();
}

// ---- the loop ----------------------------------------------------------------------------------

void CudaLane::pump() {
    name_thread(direction_ == Direction::Save ? "kvf-save" : "kvf-load", context_.ordinal());
    prctl(PR_SET_TIMERSLACK, 1000UL); // its short sleeps are to be short: nanoseconds
    try {
        context_.adopt_thread();
    } catch (const Error &error) {
        break_down(error);
    }
    for (;;) {
        bool progress = retire();
        progress |= queue_copies();
        progress |= refill();
        progress |= ask_gates();
        if (progress || pieces_ > 0) gated_since_ns_ = 0;
        if (progress) continue;
        if (pieces_ > 0) {
            idle();
            continue;
        }
        std::unique_lock lock(mutex_);
        if (!schedule_.empty()) {
            wait_for_gates(lock);
        } else if (stopping_) {
            return;
        } else if (now_ns() < expected_until_ns_) {
            lock.unlock();
            relax();
        } else {
            const auto wanted = [this] {
                return stopping_ || !schedule_.empty() || now_ns() < expected_until_ns_;
            };
            if (memory_.empty() && (!landings_ || landings_->empty())) {
                work_.wait(lock, wanted);
            } else if (!work_.wait_for(lock, std::chrono::nanoseconds(idle_ns()), wanted)) {
                lock.unlock();
                memory_.trim();
                if (landings_) landings_->trim();
            }
        }
    }
}

// Asks some of the streams that legs follow whether they are done. Without the lock: nobody who submits or cancels shall
// wait for it. True if a leg may begin for that.
bool CudaLane::ask_gates() {
    if (!follows_streams_) return false;
    const uint64_t begin_ns = now_ns();
    if (pieces_ > 0 && begin_ns - asked_ns_ < kLeastGateSleepNs)
        return false; // there is other work
    bool admitted = false;
    for (const uint32_t priority : {KVF_PRIORITY_URGENT, KVF_PRIORITY_BACKGROUND}) {
        GateCheck check;
        {
            std::lock_guard lock(mutex_);
            if (schedule_.next_gates(priority, check)) all_asked_[priority] = true;
        }
        check.run();
        std::lock_guard lock(mutex_);
        admitted |= schedule_.admit(priority, check);
    }
    asked_ns_ = now_ns();
    asking_ns_ = pieces_ > 0 ? 0 : asking_ns_ + (asked_ns_ - begin_ns);
    return admitted;
}

// What there is follows streams that are still at work, or is still being recorded. Recording announces what comes. A
// stream announces nothing, and is asked ever more seldom: the longer the wait has been, the longer the sleep, up to an
// eighth of it. Asking takes half of the pump's time at most.
void CudaLane::wait_for_gates(std::unique_lock<std::mutex> &lock) {
    if (follows_streams_ && !(all_asked_[0] && all_asked_[1])) return; // first the others
    const uint64_t now = now_ns();
    if (!gated_since_ns_) gated_since_ns_ = now;
    const uint64_t sleep = std::max(
        std::clamp((now - gated_since_ns_) / 8, kLeastGateSleepNs, kMostGateSleepNs), asking_ns_);
    const auto arrived = [this] { return stopping_ || arrivals_ != seen_arrivals_; };
    if (work_.wait_for(lock, std::chrono::nanoseconds(sleep), arrived)) gated_since_ns_ = 0;
    all_asked_ = {};
    asking_ns_ = 0;
}

// Nothing can be done at this moment, but pieces are under way.
void CudaLane::idle() {
    const bool on_device = std::any_of(slots_.begin(), slots_.end(), [](const CudaSlot &slot) {
        return slot.stage == Stage::Copying || slot.stage == Stage::Finishing;
    });
    if (!on_device) {
        // The crew tells when it is done.
        std::unique_lock lock(mutex_);
        work_.wait_for(lock, std::chrono::milliseconds(1), [this] { return crew_ended_; });
        crew_ended_ = false;
        return;
    }
    if (copies_queued_ < 2) return relax(); // the engine would stand still meanwhile
    if (urgent_) {
        // The queue is full for a while: looking at it now and then is enough.
        if (copies_queued_ > 2) return std::this_thread::sleep_for(std::chrono::microseconds(10));
        return relax();
    }
    // One copy is under way, and another behind it: time to spare the core, until something comes.
    Pacer &current = pacer(last_queued_);
    if (current.measuring() || current.expected_ns() < 2 * kLeastSleepNs) return relax();
    std::unique_lock lock(mutex_);
    work_.wait_for(lock, std::chrono::nanoseconds(current.expected_ns() / 2),
                   [this] { return arrivals_ != seen_arrivals_; });
}

// Moves pieces on whose part has ended. True if there was one.
bool CudaLane::retire() {
    bool progress = false;
    for (CudaSlot &slot : slots_) {
        switch (slot.stage) {
        case Stage::Idle:
        case Stage::Ready: break;
        case Stage::Filling:
            if (!slot.crew_done.load(std::memory_order_acquire)) break;
            slot.stage = Stage::Ready;
            progress = true;
            break;
        case Stage::Draining:
            if (!slot.crew_done.load(std::memory_order_acquire)) break;
            end_piece(slot);
            progress = true;
            break;
        case Stage::Copying:
        case Stage::Finishing: {
            const bool copying = slot.stage == Stage::Copying;
            const CUresult result =
                broken() ? CUDA_SUCCESS
                         : driver_.cuEventQuery(copying ? slot.copied : slot.finished);
            if (result != CUDA_SUCCESS && now_ns() - slot.queued_ns > stuck_ns()) {
                context_.give_up();
                for (CudaSlot &other : slots_) {
                    if (other.leg) other.leg->job->mark_buffer_lost();
                }
                break_down(Error(KVF_ERR_DEVICE_LOST, "a copy did not end"));
                break;
            }
            if (result == CUDA_ERROR_NOT_READY) break;
            if (copying) {
                leave_queue(slot);
                note_pace(slot);
            }
            progress = true;
            slot.stage = Stage::Finishing;
            if (result != CUDA_SUCCESS) {
                attempt(slot, [&] { driver_.check(result, "cuEventQuery"); });
            } else if (!copying || direction_ == Direction::Save || slot.way != CudaWay::Gather) {
                after_device(slot);
            }
            break;
        }
        }
    }
    return progress;
}

bool CudaLane::queue_copies() {
    bool progress = false;
    for (;;) {
        // The one that has been ready for longest.
        CudaSlot *next = nullptr;
        for (CudaSlot &slot : slots_) {
            if (slot.stage == Stage::Ready && (!next || slot.begin_ns < next->begin_ns))
                next = &slot;
        }
        if (!next || !may_queue(*next)) return progress;
        last_queued_ = next->way;
        attempt(*next, [&] { queue_copy(*next); });
        progress = true;
    }
}

bool CudaLane::may_queue(const CudaSlot &slot) {
    if (!urgent_) return copies_queued_ < pacer(slot.way).pace().window;
    return copies_queued_ < kLeastQueued || bytes_queued_ < kUrgentQueuedBytes;
}

// A copy has ended. If more were there to be queued all the time, its pacer learns from it.
void CudaLane::note_pace(const CudaSlot &slot) {
    const uint64_t now = now_ns();
    if (!urgent_ && last_end_ns_) {
        const auto way = static_cast<size_t>(slot.way);
        pacers_[way].note(slot.epoch, slot.bytes, now - last_end_ns_);
        pace_bytes_[way].store(pacers_[way].pace().bytes, std::memory_order_relaxed);
        pace_window_[way].store(pacers_[way].pace().window, std::memory_order_relaxed);
    }
    const bool more =
        copies_queued_ > 0 || std::any_of(slots_.begin(), slots_.end(), [](const CudaSlot &other) {
            return other.stage == Stage::Ready;
        });
    last_end_ns_ = !urgent_ && more ? now : 0;
}

std::string CudaLane::describe_pace() const {
    const auto one = [this](const char *name, CudaWay way) {
        const auto at = static_cast<size_t>(way);
        return format("\"%s\": {\"bytes\": %llu, \"queued\": %u}", name,
                      static_cast<unsigned long long>(pace_bytes_[at].load()),
                      pace_window_[at].load());
    };
    return "{" + one("runs", CudaWay::Run) + ", " + one("rows", CudaWay::Block) + ", " +
           one("gathered", CudaWay::Gather) + "}";
}

// Takes new pieces into idle slots.
bool CudaLane::refill() {
    bool progress = false;
    for (;;) {
        std::unique_lock lock(mutex_);
        seen_arrivals_ = arrivals_;
        follows_streams_ = schedule_.has_following(KVF_PRIORITY_URGENT) ||
                           schedule_.has_following(KVF_PRIORITY_BACKGROUND);
        bool one_waits = false;
        Leg *leg = schedule_.front(KVF_PRIORITY_URGENT, [&](const Leg &other) {
            const bool waits = pieces_ > 0 && planner_.is_worth_waiting(other);
            one_waits |= waits;
            return waits;
        });
        const bool urgent = leg || one_waits;
        if (!urgent) leg = schedule_.front(KVF_PRIORITY_BACKGROUND);
        if (leg || urgent) urgent_ = urgent;
        if (!leg) return progress;
        // In the background the next piece is made ready while one is being copied, and no more.
        if (!urgent && pieces_ >= kBackgroundSlots) return progress;
        CudaSlot *slot = idle_slot();
        if (!slot) return progress;
        slot->way = planner_.way_of(*leg, urgent);
        const Pacer::Pace &pace = pacer(slot->way).pace();
        const uint64_t most = urgent ? CudaPlanner::kUrgentBytes : pace.bytes;
        if (const auto lack = planner_.lend(*slot, *leg, urgent, most); lack != Lack::Nothing) {
            const std::shared_ptr<Job> job = leg->job;
            lock.unlock();
            if (!obtain(lack, job)) return progress;
            continue; // another leg may be in front by now
        }

        slot->leg = leg;
        slot->epoch = pace.epoch;
        schedule_.take(*leg, [&] { planner_.take(*slot, *leg, urgent, most); });
        lock.unlock();

        slot->begin_ns = now_ns();
        slot->queued_ns = 0;
        ++pieces_;
        leg->job->note_started(slot->begin_ns);
        attempt(*slot, [&] { prepare(*slot); });
        progress = true;
    }
}

// Gets what lend() lacked, without the lock: the driver takes its time for that, and nobody who submits or cancels
// shall wait for it. False if it has to be waited for until slots give theirs back. Where there is no bounce buffer at
// all, the job ends.
bool CudaLane::obtain(Lack lack, const std::shared_ptr<Job> &job) {
    switch (lack) {
    case Lack::Nothing: return true;
    case Lack::Segment: return false;
    case Lack::Staging: memory_.allocate_staging(); return true;   // or rows are copied one by one
    case Lack::Resident: memory_.allocate_resident(); return true; // or rows travel with each piece
    case Lack::Table: return memory_.ensure_rows();
    case Lack::Bounce: break;
    }
    try {
        return memory_.ensure_bounce();
    } catch (const Error &error) {
        job->fail(error.status, error.detail);
        if (error.status == KVF_ERR_DEVICE_LOST) break_down(error);
        job->cut_short(); // its leg here, and those on other devices, end
        return true;
    }
}

CudaSlot *CudaLane::idle_slot() {
    for (CudaSlot &slot : slots_) {
        if (slot.stage == Stage::Idle) return &slot;
    }
    return nullptr;
}

// ---- one piece ---------------------------------------------------------------------------------

// What precedes the copy.
void CudaLane::prepare(CudaSlot &slot) {
    Job &job = *slot.leg->job;
    slot.stage = Stage::Ready;
    if (slot.way == CudaWay::Gather) {
        // Before the data of a load, too: behind it, the table would wait for other slots' copies.
        copies_.send_table(slot);
        if (direction_ == Direction::Save) copies_.launch(slot, kernel_blocks());
    }
    if (direction_ == Direction::Load && !job.request.pinned) crew_copies(slot, Stage::Filling);
}

uint32_t CudaLane::kernel_blocks() const { return urgent_ ? kUrgentBlocks : kBackgroundBlocks; }

// Has the crew copy between the bounce buffer and the job's.
void CudaLane::crew_copies(CudaSlot &slot, Stage stage) {
    slot.crew_done.store(false, std::memory_order_relaxed);
    slot.stage = stage;
    crew_.add([this, &slot, buffer = slot.leg->job->request.buffer] {
        unsigned char *packed = slot.bounce->memory();
        for (const Piece &piece : slot.pieces) {
            copy_packed(piece, packed, buffer, direction_);
            packed += piece.bytes;
        }
        std::lock_guard lock(mutex_);
        slot.crew_done.store(true, std::memory_order_release);
        crew_ended_ = true;
        work_.notify_one();
    });
}

void CudaLane::queue_copy(CudaSlot &slot) {
    Job &job = *slot.leg->job;
    slot.queued_ns = now_ns();
    if (!job.stopping()) copies_.copy(slot);
    driver_.check(driver_.cuEventRecord(slot.copied, slot.stream), "cuEventRecord");
    slot.stage = Stage::Copying;
    ++copies_queued_;
    bytes_queued_ += slot.bytes;
    if (direction_ == Direction::Load && slot.way == CudaWay::Gather) {
        if (!job.stopping()) copies_.launch(slot, kernel_blocks());
        driver_.check(driver_.cuEventRecord(slot.finished, slot.stream), "cuEventRecord");
    }
}

void CudaLane::leave_queue(const CudaSlot &slot) {
    --copies_queued_;
    bytes_queued_ -= slot.bytes;
}

// The device has done its part.
void CudaLane::after_device(CudaSlot &slot) {
    Job &job = *slot.leg->job;
    if (direction_ == Direction::Load || job.request.pinned || job.stopping())
        return end_piece(slot);
    attempt(slot, [&] { crew_copies(slot, Stage::Draining); });
}

void CudaLane::end_piece(CudaSlot &slot) {
    Leg &leg = *slot.leg;
    Job &job = *leg.job;
    owner_.trace(job, slot.queued_ns ? slot.queued_ns : slot.begin_ns, now_ns(), slot.bytes,
                 device_);
    planner_.give_back(slot);
    if (leg.landing) leg.landing->advance(moved_before(slot));
    slot.stage = Stage::Idle;
    slot.leg = nullptr;
    --pieces_;
    std::unique_lock lock(mutex_);
    const bool ended = schedule_.piece_ended(leg);
    lock.unlock();
    if (ended) job.leg_ended(leg);
}

// Of a leg that goes to a landing: all before that place in the buffer has been moved, if this slot has.
uint64_t CudaLane::moved_before(const CudaSlot &slot) {
    const auto first = [](const CudaSlot &one) { return one.pieces.front().offset(); };
    uint64_t offset = 0;
    {
        std::lock_guard lock(mutex_);
        const Parts &parts = slot.leg->parts;
        offset = parts.bytes() - parts.left();
    }
    for (const CudaSlot &other : slots_) {
        if (&other != &slot && other.leg == slot.leg) offset = std::min(offset, first(other));
    }
    return offset;
}

// ---- trouble -----------------------------------------------------------------------------------

// Runs a step of a piece; if it fails, the piece's job does.
template <class Function>
void CudaLane::attempt(CudaSlot &slot, Function &&function) {
    try {
        if (broken()) throw Error(KVF_ERR_DEVICE_LOST, why_broken_);
        function();
    } catch (const Error &error) {
        fail_piece(slot, error);
    } catch (const std::exception &) {
        fail_piece(slot, Error(KVF_ERR_OUT_OF_MEMORY));
    }
}

void CudaLane::fail_piece(CudaSlot &slot, const Error &error) {
    Job &job = *slot.leg->job;
    job.fail(error.status, error.detail);
    if (error.status == KVF_ERR_DEVICE_LOST) break_down(error);
    job.cut_short(); // the rest of the job, on other devices too, need not be moved
    if (slot.stage == Stage::Copying) leave_queue(slot);
    // What the stream holds already may still touch the buffer: the piece ends when that has ended.
    if (!broken() && driver_.cuEventRecord(slot.finished, slot.stream) == CUDA_SUCCESS) {
        slot.stage = Stage::Finishing;
        if (!slot.queued_ns) slot.queued_ns = now_ns();
        return;
    }
    end_piece(slot);
}

// The device is lost. Every leg ends with that, those in slots as they are looked at next.
void CudaLane::break_down(const Error &error) {
    context_.note_lost();
    {
        std::lock_guard lock(mutex_);
        try {
            if (!broken()) why_broken_ = error.detail;
        } catch (const std::bad_alloc &) {
            // That it is broken must do.
        }
        broken_.store(true, std::memory_order_release);
        schedule_.for_each([&](Leg &leg) { leg.job->fail(KVF_ERR_DEVICE_LOST, error.detail); });
        for (CudaSlot &slot : slots_) {
            if (slot.leg) slot.leg->job->fail(KVF_ERR_DEVICE_LOST, error.detail);
        }
    }
    owner_.cut_short_stopping(); // on other devices too
}

} // namespace kvf
