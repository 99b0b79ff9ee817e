// The lane and its loop: which pieces it takes, and when it queues their copies. lane_pieces.cpp
// has the way of one piece.
#include "cuda/lane.h"

#include <sys/prctl.h>

#include <algorithm>
#include <chrono>

#include "core/thread.h"

namespace kvf {
namespace {

// Copies of urgent jobs that are queued, so that the queue never runs empty: at least so many, and
// then up to so many bytes.
constexpr uint32_t kLeastQueued = 2;
constexpr uint64_t kUrgentQueuedBytes = 32 << 20;
// Slots in use for background jobs: two with a queued copy, and two that are made ready.
constexpr uint32_t kBackgroundSlots = 4;

// The pump does not sleep for less, since it could wake too late.
constexpr uint64_t kLeastSleepNs = 15'000;
constexpr std::chrono::microseconds kFullQueueSleep{10};

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

} // namespace

CudaLane::CudaLane(JobOwner &owner, const CudaContext &context, const CudaKernels *kernels,
                   ThreadPool &copy_threads, CudaAheadPool *ahead, uint32_t device,
                   Direction direction, Limits limits)
    : owner_(owner), context_(context), driver_(context.driver()), copy_threads_(copy_threads),
      ahead_(ahead), device_(device), direction_(direction),
      memory_(context, limits.pinned, kernels ? limits.staging_bytes : 0),
      planner_(direction, memory_, limits.max_pitch),
      copies_(context, kernels, direction, limits.max_pitch, planner_), pace_(direction) {
    const CudaCurrent current(context_);
    try {
        for (CudaSlot &slot : slots_) create(slot);
    } catch (...) {
        for (CudaSlot &slot : slots_) destroy(slot);
        throw;
    }
}

CudaLane::~CudaLane() {
    stop();
    context_.clean_up([this](const CudaDriver &) {
        for (CudaSlot &slot : slots_) destroy(slot);
    });
}

void CudaLane::create(CudaSlot &slot) {
    slot.pieces.reserve(CudaPlanner::kMostPieces); // taking pieces cannot fail
    slot.places.reserve(CudaPlanner::kMostPieces);
    driver_.check(driver_.cuStreamCreateWithPriority(&slot.stream, CU_STREAM_NON_BLOCKING, 0),
                  "cuStreamCreateWithPriority");
    for (CUevent *event : {&slot.copied, &slot.finished}) {
        driver_.check(driver_.cuEventCreate(event, CU_EVENT_DISABLE_TIMING), "cuEventCreate");
    }
}

void CudaLane::destroy(CudaSlot &slot) {
    if (slot.copied) driver_.cuEventDestroy(slot.copied);
    if (slot.finished) driver_.cuEventDestroy(slot.finished);
    if (slot.stream) driver_.cuStreamDestroy(slot.stream);
}

void CudaLane::submit(Leg &leg) {
    schedule_.add(leg, [&] {
        if (broken()) {
            leg.job->fail(KVF_ERR_DEVICE_LOST, why_broken_);
        } else if (context_.lost()) {
            leg.job->fail(KVF_ERR_DEVICE_LOST, "an earlier transfer found it lost");
        } else if (!thread_.joinable()) {
            thread_ = start_thread([this] { pump(); });
        }
    });
}

void CudaLane::stop() {
    schedule_.stop();
    if (thread_.joinable()) thread_.join();
}

// ---- The loop ----------------------------------------------------------------------------------

void CudaLane::pump() {
    name_thread(direction_ == Direction::Save ? "kvf-save" : "kvf-load", context_.ordinal());
    prctl(PR_SET_TIMERSLACK, 1000UL); // nanoseconds, so that short sleeps are short
    try {
        context_.adopt_thread();
    } catch (const Error &error) {
        break_down(error);
    }
    using Next = CudaLaneSchedule::Next;
    for (;;) {
        bool progress = poll_slots();
        progress |= queue_copies();
        progress |= refill();
        progress |= schedule_.ask_streams(pieces_ > 0);
        if (progress || pieces_ > 0) schedule_.note_progress();
        if (progress) continue;
        if (pieces_ > 0) {
            wait_for_pieces();
            continue;
        }
        const bool holds_memory = !memory_.empty() || (ahead_ && !ahead_->empty());
        switch (schedule_.wait(holds_memory)) {
        case Next::Look: break;
        case Next::Spin: relax(); break;
        case Next::Rest: trim_idle(); break;
        case Next::End: return;
        }
    }
}

void CudaLane::trim_idle() {
    memory_.trim();
    if (ahead_) ahead_->trim();
}

// Waits a little, while pieces move and no step of theirs has ended.
void CudaLane::wait_for_pieces() {
    const bool on_device = std::any_of(slots_.begin(), slots_.end(), [](const CudaSlot &slot) {
        return slot.stage == Stage::Copying || slot.stage == Stage::Finishing;
    });
    if (!on_device) return schedule_.wait_for_host_copy();
    if (copies_queued_ < 2) return relax(); // a longer wait could leave the copy engine idle
    if (urgent_) {
        // The queue is full: it lasts longer than a sleep.
        if (copies_queued_ > 2) return std::this_thread::sleep_for(kFullQueueSleep);
        return relax();
    }
    // One copy is moving and another one is queued behind it: the pump has time to sleep.
    const uint64_t expected_ns = pace_.expected_ns(last_queued_);
    if (expected_ns < 2 * kLeastSleepNs) return relax();
    schedule_.wait_for_addition(expected_ns / 2);
}

// Takes the next step of each piece whose step has ended. Returns true if there was one.
bool CudaLane::poll_slots() {
    bool progress = false;
    for (CudaSlot &slot : slots_) {
        switch (slot.stage) {
        case Stage::Idle:
        case Stage::Ready: break;
        case Stage::Filling:
            if (!slot.host_copied.load(std::memory_order_acquire)) break;
            slot.stage = Stage::Ready;
            progress = true;
            break;
        case Stage::Draining:
            if (!slot.host_copied.load(std::memory_order_acquire)) break;
            end_piece(slot);
            progress = true;
            break;
        case Stage::Copying:
        case Stage::Finishing: progress |= poll_stream(slot); break;
        }
    }
    return progress;
}

// Queues the copies of slots that are ready, the oldest first, until the queue is long enough.
// Returns true if there was one.
bool CudaLane::queue_copies() {
    bool progress = false;
    for (;;) {
        CudaSlot *next = nullptr;
        for (CudaSlot &slot : slots_) {
            if (slot.stage == Stage::Ready && (!next || slot.begin_ns < next->begin_ns))
                next = &slot;
        }
        if (!next || !may_queue(*next)) return progress;
        last_queued_ = next->way;
        queue_copy(*next);
        progress = true;
    }
}

bool CudaLane::may_queue(const CudaSlot &slot) const {
    if (!urgent_) return copies_queued_ < pace_.of(slot.way).window;
    return copies_queued_ < kLeastQueued || bytes_queued_ < kUrgentQueuedBytes;
}

// Takes new pieces into idle slots. Returns true if there was one.
bool CudaLane::refill() {
    bool progress = false;
    for (;;) {
        std::unique_lock lock = schedule_.look();
        Leg *leg = next_leg();
        // A background lane makes the next pieces ready while others are copied, and no more.
        if (!leg || (!urgent_ && pieces_ >= kBackgroundSlots)) return progress;
        CudaSlot *slot = idle_slot();
        if (!slot) return progress;
        slot->way = planner_.way_of(*leg, urgent_);
        const Pacer::Pace &pace = pace_.of(slot->way);
        const uint64_t most = urgent_ ? CudaPlanner::kUrgentBytes : pace.bytes;
        const Missing missing = planner_.acquire_memory(*slot, *leg, urgent_, most);
        if (missing != Missing::Nothing) {
            const std::shared_ptr<Job> job = leg->job;
            lock.unlock();
            if (!allocate(missing, job)) return progress;
            continue; // another leg may be the first by now
        }
        slot->leg = leg;
        slot->epoch = pace.epoch;
        schedule_.legs().take(*leg, [&] { planner_.take(*slot, *leg, urgent_, most); });
        lock.unlock();
        begin_piece(*slot);
        progress = true;
    }
}

// ---- New pieces --------------------------------------------------------------------------------

// Returns the leg that moves next, and notes whether the lane is urgent now. Returns NULL if none
// can move, or if background legs must not overtake an urgent leg that is worth waiting for. With
// the schedule's lock.
Leg *CudaLane::next_leg() {
    Schedule &legs = schedule_.legs();
    bool any_waits = false;
    Leg *leg = legs.front(KVF_PRIORITY_URGENT, [&](const Leg &other) {
        const bool waits = pieces_ > 0 && planner_.is_worth_waiting(other);
        any_waits |= waits;
        return waits;
    });
    const bool urgent = leg || any_waits;
    if (!urgent) leg = legs.front(KVF_PRIORITY_BACKGROUND);
    if (leg || urgent) urgent_ = urgent;
    return leg;
}

CudaSlot *CudaLane::idle_slot() {
    for (CudaSlot &slot : slots_) {
        if (slot.stage == Stage::Idle) return &slot;
    }
    return nullptr;
}

// Allocates the memory that a slot was missing. Without the schedule's lock, so that nobody who
// submits or cancels waits while the driver allocates. Returns false if the slot must wait for
// memory that other slots use. If there is no bounce buffer at all, the job fails.
bool CudaLane::allocate(Missing missing, const std::shared_ptr<Job> &job) {
    switch (missing) {
    case Missing::Nothing: return true;
    case Missing::Segment: return false;
    case Missing::Staging: memory_.allocate_staging(); return true;
    case Missing::Resident: memory_.allocate_resident(); return true;
    case Missing::Table: return memory_.allocate_rows();
    case Missing::Bounce: break;
    }
    try {
        return memory_.allocate_bounce();
    } catch (const Error &error) {
        job->fail(error.status, error.detail);
        if (error.status == KVF_ERR_DEVICE_LOST) break_down(error);
        job->cut_short(); // its leg here, and those on other devices, end
        return true;
    }
}

} // namespace kvf
