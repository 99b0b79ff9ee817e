#include "cuda/lane.h"

#include <sys/prctl.h>

#include <algorithm>
#include <chrono>
#include <new>

#include "core/thread.h"
#include "memory/copy.h"

namespace kvf {
namespace {

// Copies in the queue for urgent jobs: so many that it never runs empty.
constexpr uint32_t kLeastQueued = 2;
constexpr uint64_t kUrgentQueuedBytes = 32 << 20;
// Slots in use for background jobs: those with a copy in the queue, and two that are made ready.
constexpr uint32_t kBackgroundSlots = 4;

constexpr uint32_t kUrgentBlocks = 64, kBackgroundBlocks = 32; // of a kernel's grid

// A shorter sleep is not worth the risk of waking too late.
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
    prctl(PR_SET_TIMERSLACK, 1000UL); // nanoseconds: the pump's short sleeps are to be short
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

// Waits a little, while pieces are under way and none can be moved on at this moment.
void CudaLane::wait_for_pieces() {
    const bool on_device = std::any_of(slots_.begin(), slots_.end(), [](const CudaSlot &slot) {
        return slot.stage == Stage::Copying || slot.stage == Stage::Finishing;
    });
    if (!on_device) return schedule_.wait_for_host_copy();
    if (copies_queued_ < 2) return relax(); // the copy engine would stand still meanwhile
    if (urgent_) {
        // With a full queue, looking now and then is enough.
        if (copies_queued_ > 2) return std::this_thread::sleep_for(kFullQueueSleep);
        return relax();
    }
    // One copy is under way and another one behind it: there is time to leave the core to others.
    const uint64_t expected_ns = pace_.expected_ns(last_queued_);
    if (expected_ns < 2 * kLeastSleepNs) return relax();
    schedule_.wait_for_arrival(expected_ns / 2);
}

// Moves pieces on whose current step has ended. Returns true if there was one.
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
        attempt(*next, [&] { queue_copy(*next); });
        progress = true;
    }
}

// Takes new pieces into idle slots. Returns true if there was one.
bool CudaLane::refill() {
    bool progress = false;
    for (;;) {
        std::unique_lock lock = schedule_.look();
        Leg *leg = next_leg();
        // In the background the next piece is made ready while one is being copied, and no more.
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
            continue; // another leg may be in front by now
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

// Allocates what a slot was missing. Without the lock, since the driver takes its time, and nobody
// who submits or cancels shall wait for that. Returns false if what other slots have must be waited
// for. Where there is no bounce buffer at all, the job ends.
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

// Does what precedes the copy.
void CudaLane::begin_piece(CudaSlot &slot) {
    slot.begin_ns = now_ns();
    slot.queued_ns = 0;
    ++pieces_;
    Job &job = *slot.leg->job;
    job.note_started(slot.begin_ns);
    attempt(slot, [&] {
        slot.stage = Stage::Ready;
        if (slot.way == CudaWay::Staged) {
            // Of a load too: sent after the data, the table would wait for other slots' copies.
            copies_.send_table(slot);
            if (direction_ == Direction::Save) copies_.launch(slot, kernel_blocks());
        }
        if (direction_ == Direction::Load && !job.request.pinned)
            start_host_copy(slot, Stage::Filling);
    });
}

// ---- The way of a piece ------------------------------------------------------------------------

// Has the copy threads copy between the bounce buffer and the job's buffer.
void CudaLane::start_host_copy(CudaSlot &slot, Stage stage) {
    slot.host_copied.store(false, std::memory_order_relaxed);
    slot.stage = stage;
    copy_threads_.add([this, &slot, buffer = slot.leg->job->request.buffer] {
        unsigned char *packed = slot.bounce->data();
        for (const Piece &piece : slot.pieces) {
            copy_packed(piece, packed, buffer, direction_);
            packed += piece.bytes;
        }
        schedule_.host_copy_ended(slot.host_copied);
    });
}

bool CudaLane::may_queue(const CudaSlot &slot) const {
    if (!urgent_) return copies_queued_ < pace_.of(slot.way).window;
    return copies_queued_ < kLeastQueued || bytes_queued_ < kUrgentQueuedBytes;
}

void CudaLane::queue_copy(CudaSlot &slot) {
    Job &job = *slot.leg->job;
    slot.queued_ns = now_ns();
    if (!job.stopping()) copies_.copy(slot);
    driver_.check(driver_.cuEventRecord(slot.copied, slot.stream), "cuEventRecord");
    slot.stage = Stage::Copying;
    ++copies_queued_;
    bytes_queued_ += slot.bytes;
    if (direction_ == Direction::Load && slot.way == CudaWay::Staged) {
        if (!job.stopping()) copies_.launch(slot, kernel_blocks());
        driver_.check(driver_.cuEventRecord(slot.finished, slot.stream), "cuEventRecord");
    }
}

uint32_t CudaLane::kernel_blocks() const { return urgent_ ? kUrgentBlocks : kBackgroundBlocks; }

// Moves a piece on if the device has done what its stage waits for. Returns false if it has not.
bool CudaLane::poll_stream(CudaSlot &slot) {
    const bool copying = slot.stage == Stage::Copying;
    const CUresult result =
        broken() ? CUDA_SUCCESS : driver_.cuEventQuery(copying ? slot.copied : slot.finished);
    if (result != CUDA_SUCCESS && now_ns() - slot.queued_ns > stuck_ns()) {
        give_up();
        return false;
    }
    if (result == CUDA_ERROR_NOT_READY) return false;
    if (copying) {
        leave_queue(slot);
        note_pace(slot);
        // If a step fails below, fail_piece() must not take the slot out of the queue again.
        slot.stage = Stage::Finishing;
    }
    // A load that was staged goes on: its scatter kernel must finish.
    if (result != CUDA_SUCCESS) {
        attempt(slot, [&] { driver_.check(result, "cuEventQuery"); });
    } else if (!copying || direction_ == Direction::Save || slot.way != CudaWay::Staged) {
        after_device(slot);
    }
    return true;
}

void CudaLane::leave_queue(const CudaSlot &slot) {
    --copies_queued_;
    bytes_queued_ -= slot.bytes;
}

void CudaLane::note_pace(const CudaSlot &slot) {
    const bool more =
        copies_queued_ > 0 || std::any_of(slots_.begin(), slots_.end(), [](const CudaSlot &other) {
            return other.stage == Stage::Ready;
        });
    pace_.copy_ended(slot, urgent_, more);
}

// The device has done its part.
void CudaLane::after_device(CudaSlot &slot) {
    Job &job = *slot.leg->job;
    if (direction_ == Direction::Load || job.request.pinned || job.stopping())
        return end_piece(slot);
    attempt(slot, [&] { start_host_copy(slot, Stage::Draining); });
}

void CudaLane::end_piece(CudaSlot &slot) {
    Leg &leg = *slot.leg;
    owner_.trace(*leg.job, slot.queued_ns ? slot.queued_ns : slot.begin_ns, now_ns(), slot.bytes,
                 device_);
    planner_.release_memory(slot);
    if (leg.load_ahead) leg.load_ahead->staged_up_to(staged_up_to(slot));
    slot.stage = Stage::Idle;
    slot.leg = nullptr;
    --pieces_;
    schedule_.piece_ended(leg);
}

// The buffer offset of the first byte that is not staged, when the slot's pieces have been staged.
uint64_t CudaLane::staged_up_to(const CudaSlot &slot) {
    uint64_t offset = schedule_.bytes_taken(*slot.leg);
    for (const CudaSlot &other : slots_) {
        if (&other == &slot || other.leg != slot.leg) continue;
        offset = std::min(offset, other.pieces.front().offset());
    }
    return offset;
}

// ---- Failures ----------------------------------------------------------------------------------

// Does a step of a piece. If the step fails, the piece's job fails.
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
    // The stream may hold something already that touches the buffer: the piece ends when that has
    // ended.
    if (!broken() && driver_.cuEventRecord(slot.finished, slot.stream) == CUDA_SUCCESS) {
        slot.stage = Stage::Finishing;
        if (!slot.queued_ns) slot.queued_ns = now_ns();
        return;
    }
    end_piece(slot);
}

// A copy does not end: the buffers of all pieces under way may be touched at any time from now on.
void CudaLane::give_up() {
    context_.give_up();
    for (CudaSlot &slot : slots_) {
        if (slot.leg) slot.leg->job->mark_buffer_lost();
    }
    break_down(Error(KVF_ERR_DEVICE_LOST, "a copy did not end"));
}

// The device is lost. All legs end with that: those in the schedule now, those in slots when the
// pump looks at them next.
void CudaLane::break_down(const Error &error) {
    context_.note_lost();
    {
        const std::unique_lock lock = schedule_.lock();
        try {
            if (!broken()) why_broken_ = error.detail;
        } catch (const std::bad_alloc &) {
            // There is no room for the reason. The status tells that the device is lost.
        }
        broken_.store(true, std::memory_order_release);
        schedule_.legs().for_each(
            [&](Leg &leg) { leg.job->fail(KVF_ERR_DEVICE_LOST, error.detail); });
        for (CudaSlot &slot : slots_) {
            if (slot.leg) slot.leg->job->fail(KVF_ERR_DEVICE_LOST, error.detail);
        }
    }
    owner_.cut_short_stopping(); // on other devices too
}

} // namespace kvf
