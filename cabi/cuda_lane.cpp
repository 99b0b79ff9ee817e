#include "cuda_lane.h"

#include <sys/prctl.h>

#include <algorithm>
#include <new>
#include <utility>

#include "copy.h"
#include "engine.h"
#include "thread_name.h"

namespace kvf {
namespace {

// What a slot takes at once for an urgent job: so much that queuing it costs nothing beside moving it, and yet a
// cancelled job stops within a millisecond.
constexpr uint64_t kUrgentBytes = 16 << 20;
// For a background job the pacer says. Where it begins, and what share of the link it aims at: runs, blocks, the
// gathered. (What was best on an H200: docs/performance.md. Loads cost decoding more than saves, and reach more with less.)
constexpr uint64_t kFirstRun = 4 << 20, kFirstBlock = 6 << 20, kFirstGather = 4 << 20;
constexpr double kSavedRunShare = 0.975, kLoadedRunShare = 0.97, kRowsShare = 0.93;
constexpr size_t kMostPieces = 64;

// Copies in the queue: for urgent jobs so many that it never runs empty.
constexpr uint32_t kLeastQueued = 2;
constexpr uint64_t kUrgentQueuedBytes = 32 << 20;
// Slots in use for background jobs: those in the queue, and two being made ready.
constexpr uint32_t kBackgroundSlots = 4;

// A shorter stretch of the irregular rest, or a smaller block, is not worth a launch of its own.
constexpr uint64_t kLeastResident = 64;
constexpr uint64_t kLeastRegular = 512 << 10;
// Rows narrower than this are gathered: the copy engine moves them slower than the link.
constexpr uint64_t kNarrow = 1024;
// From the host the engine reads whole lines of this size, and rows that begin between two of them cost it one more
// each: wider rows than this hardly. (An H200: rows of 2 KiB at offsets that are not multiples of 256 were loaded at 0.966
// of the raw speed, others at 0.990. What it writes may begin anywhere.)
constexpr uint64_t kHostLine = 256;
constexpr uint64_t kWide = 8 << 10;
// Between pieces that are loaded through staging so many bytes are copied along, rather than that a copy ends there:
// libllama's metadata between two tensors are 12.
constexpr uint64_t kBridge = 256;
// For one piece in staging: what lies before it on its first line in the host, and what aligns it.
constexpr uint64_t kPieceRoom = 2 * kHostLine;
static_assert(kBridge <= kPieceRoom && kHostLine <= CudaArena::kAlignment);
constexpr uint64_t kLeastSegment = 128 << 10;
static_assert(kLeastSegment >= kLongRun + kPieceRoom && 2 * kLeastSegment <= CudaArena::kLeast);
constexpr uint32_t kUrgentBlocks = 64, kBackgroundBlocks = 32; // of a kernel's grid
// For so long a pump stays awake for a leg that has been announced.
constexpr uint64_t kExpectNs = 500'000;
// Between two looks at streams that legs follow.
constexpr uint64_t kLeastGateSleepNs = 20'000, kMostGateSleepNs = 1'000'000;
// Shorter sleeps are not worth the risk of waking too late.
constexpr uint64_t kLeastSleepNs = 15'000;
// A copy that has not ended by then never will; the device is given up.
constexpr uint64_t kStuckNs = 60'000'000'000;

uint64_t stuck_ns() {
    static const uint64_t value = seconds_from_environment("KVFERRY_STUCK_SECONDS", kStuckNs);
    return value;
}

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

} // namespace

CudaLane::CudaLane(Engine &engine, const CudaContext &context, const CudaKernels *kernels,
                   Crew &crew, uint32_t device, Direction direction, Limits limits)
    : engine_(engine), context_(context), driver_(context.driver()), kernels_(kernels), crew_(crew),
      device_(device), direction_(direction), limits_(limits),
      memory_(context, kernels ? limits.staging_bytes : 0),
      pacers_{Pacer(direction == Direction::Save ? kSavedRunShare : kLoadedRunShare, kFirstRun),
              Pacer(kRowsShare, kFirstBlock), Pacer(kRowsShare, kFirstGather)} {
    for (size_t way = 0; way < kWays; ++way) {
        pace_bytes_[way] = pacers_[way].pace().bytes;
        pace_window_[way] = pacers_[way].pace().window;
    }
    const CudaCurrent current(context_);
    try {
        for (Slot &slot : slots_) {
            slot.pieces.reserve(kMostPieces); // taking pieces must not fail
            slot.places.reserve(kMostPieces);
            driver_.check(
                driver_.cuStreamCreateWithPriority(&slot.stream, CU_STREAM_NON_BLOCKING, 0),
                "cuStreamCreateWithPriority");
            driver_.check(driver_.cuEventCreate(&slot.copied, CU_EVENT_DISABLE_TIMING),
                          "cuEventCreate");
            driver_.check(driver_.cuEventCreate(&slot.finished, CU_EVENT_DISABLE_TIMING),
                          "cuEventCreate");
        }
    } catch (...) {
        for (Slot &slot : slots_) release(slot);
        throw;
    }
}

CudaLane::~CudaLane() {
    stop();
    try {
        const CudaCurrent current(context_);
        for (Slot &slot : slots_) release(slot);
    } catch (const Error &) {
        // The context is gone, and everything in it.
    }
}

void CudaLane::release(Slot &slot) {
    if (slot.copied) driver_.cuEventDestroy(slot.copied);
    if (slot.finished) driver_.cuEventDestroy(slot.finished);
    if (slot.stream) driver_.cuStreamDestroy(slot.stream);
}

void CudaLane::submit(Leg &leg) {
    Schedule::Legs ended;
    {
        std::lock_guard lock(mutex_);
        if (broken()) {
            leg.job->fail(KVF_ERR_DEVICE_LOST, why_broken_);
        } else if (!thread_.joinable()) {
            thread_ = std::thread([this] { pump(); });
        }
        schedule_.add(leg);
        // A job that was asked to stop before its leg came was not found then.
        if (leg.job->stopping()) schedule_.sweep(ended);
        ++arrivals_;
        work_.notify_one();
    }
    for (Leg *other : ended) other->job->leg_ended(*other);
}

void CudaLane::extend(Leg &leg, Layout &&part) {
    std::lock_guard lock(mutex_);
    leg.parts.add(std::move(part));
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
void CudaLane::expect() {
    std::lock_guard lock(mutex_);
    expected_until_ns_ = now_ns() + kExpectNs;
    work_.notify_one();
}

void CudaLane::poke() {
    Schedule::Legs ended;
    {
        std::lock_guard lock(mutex_);
        schedule_.sweep(ended);
        ++arrivals_;
        work_.notify_one();
    }
    for (Leg *leg : ended) leg->job->leg_ended(*leg);
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
            if (memory_.empty()) {
                work_.wait(lock, wanted);
            } else if (!work_.wait_for(lock, std::chrono::nanoseconds(idle_ns()), wanted)) {
                lock.unlock();
                memory_.trim();
            }
        }
    }
}

// What there is follows streams that are still at work, or is still being recorded. Recording announces what comes; a
// stream announces nothing, and is looked at ever more seldom: it has kept us waiting for eight times as long already
// as it can be overlooked.
void CudaLane::wait_for_gates(std::unique_lock<std::mutex> &lock) {
    const uint64_t now = now_ns();
    if (!gated_since_ns_) gated_since_ns_ = now;
    const uint64_t sleep =
        std::clamp((now - gated_since_ns_) / 8, kLeastGateSleepNs, kMostGateSleepNs);
    const auto arrived = [this] { return stopping_ || arrivals_ != seen_arrivals_; };
    if (work_.wait_for(lock, std::chrono::nanoseconds(sleep), arrived)) gated_since_ns_ = 0;
}

// Nothing can be done at this moment, but pieces are under way.
void CudaLane::idle() {
    const bool on_device = std::any_of(slots_.begin(), slots_.end(), [](const Slot &slot) {
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
    for (Slot &slot : slots_) {
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
                for (Slot &other : slots_) {
                    if (other.leg && other.leg->job->memory) other.leg->job->memory->haunt();
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
            } else if (!copying || direction_ == Direction::Save || slot.way != Way::Gather) {
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
        Slot *next = nullptr;
        for (Slot &slot : slots_) {
            if (slot.stage == Stage::Ready && (!next || slot.begin_ns < next->begin_ns))
                next = &slot;
        }
        if (!next || !may_queue(*next)) return progress;
        last_queued_ = next->way;
        attempt(*next, [&] { queue_copy(*next); });
        progress = true;
    }
}

bool CudaLane::may_queue(const Slot &slot) {
    if (!urgent_) return copies_queued_ < pacer(slot.way).pace().window;
    return copies_queued_ < kLeastQueued || bytes_queued_ < kUrgentQueuedBytes;
}

// A copy has ended. If more were there to be queued all the time, its pacer learns from it.
void CudaLane::note_pace(const Slot &slot) {
    const uint64_t now = now_ns();
    if (!urgent_ && last_end_ns_) {
        const auto way = static_cast<size_t>(slot.way);
        pacers_[way].note(slot.epoch, slot.bytes, now - last_end_ns_);
        pace_bytes_[way].store(pacers_[way].pace().bytes, std::memory_order_relaxed);
        pace_window_[way].store(pacers_[way].pace().window, std::memory_order_relaxed);
    }
    const bool more = copies_queued_ > 0 ||
                      std::any_of(slots_.begin(), slots_.end(),
                                  [](const Slot &other) { return other.stage == Stage::Ready; });
    last_end_ns_ = !urgent_ && more ? now : 0;
}

std::string CudaLane::describe_pace() const {
    const auto one = [this](const char *name, Way way) {
        const auto at = static_cast<size_t>(way);
        return format("\"%s\": {\"bytes\": %llu, \"queued\": %u}", name,
                      static_cast<unsigned long long>(pace_bytes_[at].load()),
                      pace_window_[at].load());
    };
    return "{" + one("runs", Way::Run) + ", " + one("rows", Way::Block) + ", " +
           one("gathered", Way::Gather) + "}";
}

// Takes new pieces into idle slots.
bool CudaLane::refill() {
    bool progress = false;
    for (;;) {
        std::unique_lock lock(mutex_);
        seen_arrivals_ = arrivals_;
        bool one_waits = false;
        Leg *leg = schedule_.front(KVF_PRIORITY_URGENT, [&](const Leg &other) {
            const bool waits = is_worth_waiting(other);
            one_waits |= waits;
            return waits;
        });
        const bool urgent = leg || one_waits;
        if (!urgent) leg = schedule_.front(KVF_PRIORITY_BACKGROUND);
        if (leg || urgent) urgent_ = urgent;
        if (!leg) return progress;
        // In the background the next piece is made ready while one is being copied, and no more.
        if (!urgent && pieces_ >= kBackgroundSlots) return progress;
        Slot *slot = idle_slot();
        if (!slot) return progress;
        slot->way = way_of(*leg, urgent);
        if (const Lack lack = lend(*slot, *leg, urgent); lack != Lack::Nothing) {
            const std::shared_ptr<Job> job = leg->job;
            lock.unlock();
            if (!obtain(lack, job)) return progress;
            continue; // another leg may be in front by now
        }

        slot->leg = leg;
        schedule_.take(*leg, [&] { take_pieces(*slot, *leg, urgent); });
        lock.unlock();

        slot->begin_ns = now_ns();
        slot->queued_ns = 0;
        ++pieces_;
        leg->job->note_started(slot->begin_ns);
        attempt(*slot, [&] { prepare(*slot); });
        progress = true;
    }
}

// What is staged for urgent jobs is taken in large pieces: rather than a small one, what is still being recorded, if
// the device has something to do meanwhile.
bool CudaLane::is_worth_waiting(const Leg &leg) const {
    return !leg.parts.is_closed() && pieces_ > 0 &&
           leg.parts.left() < std::min(kUrgentBytes, memory_.staging_bytes() / 2) &&
           way_of(leg, true) == Way::Gather;
}

// Lends a slot the memory that pieces of its way need.
CudaLane::Lack CudaLane::lend(Slot &slot, const Leg &leg, bool urgent) {
    if (!leg.job->pinned && !(slot.bounce = memory_.take_bounce())) return Lack::Bounce;
    if (slot.way != Way::Gather) return Lack::Nothing;
    // Urgent pieces share staging by two: one is copied while the kernel has the other. In the background a piece is
    // made ready behind those in the queue.
    const uint64_t all = memory_.staging_bytes();
    uint64_t wanted =
        urgent ? std::min(kUrgentBytes, leg.parts.left()) : pacer(slot.way).pace().bytes;
    if (slot.bounce) wanted = std::min(wanted, slot.bounce->bytes()); // more slots instead
    wanted += kMostPieces * kPieceRoom;
    const uint64_t most =
        std::clamp(wanted, kLeastSegment, std::max(all / (urgent ? 2 : 4), kLeastSegment));
    const uint64_t least =
        urgent ? std::clamp(most, kLeastSegment, std::max(all / 4, kLeastSegment)) : most;
    Lack lack = Lack::Nothing;
    if (all == 0) {
        lack = Lack::Staging;
    } else if (!(slot.staging = memory_.take_staging(least, most))) {
        lack = Lack::Segment;
    } else if (is_regular(leg.parts)) {
        slot.rows = Rows::Regular;
    } else if (is_for_resident(leg) && !resident_ && !(resident_ = memory_.take_resident()) &&
               memory_.has_resident()) {
        lack = Lack::Resident;
    } else if (acquire_resident(leg)) {
        slot.rows = Rows::Resident;
    } else {
        slot.rows = Rows::Table;
        if (!(slot.table = memory_.take_rows())) lack = Lack::Table;
    }
    if (lack != Lack::Nothing) give_back(slot);
    return lack;
}

// What was lent. (The resident table is given back with the last piece of it.)
void CudaLane::give_back(Slot &slot) {
    memory_.put_back(std::exchange(slot.staging, {}));
    memory_.put_back(std::move(slot.table));
    memory_.put_back(std::move(slot.bounce));
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
        engine_.poke(); // its leg here, and those on other devices, end
        return true;
    }
}

// Fills a slot with pieces of one way.
void CudaLane::take_pieces(Slot &slot, Leg &leg, bool urgent) {
    Parts &parts = leg.parts;
    const Pacer::Pace &pace = pacer(slot.way).pace();
    slot.epoch = pace.epoch;
    uint64_t most = urgent ? kUrgentBytes : pace.bytes;
    if (slot.bounce) most = std::min(most, slot.bounce->bytes());
    uint64_t rows_left = slot.way != Way::Gather       ? 1
                         : slot.rows == Rows::Resident ? CudaResidentTable::kRows
                                                       : CudaRowTable::kRows;
    slot.pieces.clear();
    slot.places.clear();
    slot.bytes = 0;
    uint64_t end = 0; // in staging
    do {
        uint64_t bytes = most - slot.bytes;
        if (slot.way == Way::Gather) {
            const uint64_t room = slot.staging.bytes - end;
            bytes = std::min(bytes, room - std::min(room, kPieceRoom));
        }
        if (const kvf_region *block = parts.block()) {
            if (slot.way == Way::Run) bytes = std::min(bytes, block->width);
            if (slot.way == Way::Gather) {
                if (!slot.pieces.empty() && block->width > bytes) break;
                if (slot.rows == Rows::Table) bytes = std::min(bytes, block->width * rows_left);
            }
        } else if (!slot.pieces.empty() && bytes < std::min(kLongRun, parts.left())) {
            break; // the next run might not fit
        }
        const Piece &piece = slot.pieces.emplace_back(parts.next(bytes, rows_left));
        slot.bytes += piece.bytes;
        if (slot.way != Way::Gather) continue;
        slot.places.push_back(place(slot, *leg.job, piece));
        end = slot.places.back() + piece.bytes;
        if (parts.empty()) break;
        if (slot.rows == Rows::Regular) {
            if (!is_regular(parts)) break;
        } else if (slot.rows == Rows::Resident) {
            if (parts.block() || parts.span().table != *piece.table) break;
        } else {
            rows_left -= piece.runs ? piece.count : piece.block.rows;
        }
    } while (!parts.empty() && slot.bytes < most && rows_left > 0 &&
             slot.pieces.size() < kMostPieces && way_of(leg, urgent) == slot.way);
}

// Where the next piece belongs in staging: behind the one before it. What comes from the host at such a distance from it
// as it has there, if that is short; else so that a copy may begin with what lies before it on its line in the host.
uint64_t CudaLane::place(const Slot &slot, const Job &job, const Piece &piece) const {
    const bool is_first = slot.places.empty();
    const Piece *last = is_first ? nullptr : &slot.pieces[slot.places.size() - 1];
    const uint64_t end = is_first ? 0 : slot.places.back() + last->bytes;
    if (direction_ == Direction::Save || !job.pinned) return end;
    if (last && last->is_packed()) {
        const uint64_t gap = piece.offset() - (last->offset() + last->bytes);
        if (gap <= kBridge) return end + gap;
    }
    return (end + kHostLine - 1) / kHostLine * kHostLine + kHostLine;
}

bool CudaLane::is_for_resident(const Leg &leg) {
    return !leg.parts.block() && leg.parts.runs_left() >= kLeastResident;
}

// Whether the next of the irregular rest can refer to the resident table. If so, that is acquired.
bool CudaLane::acquire_resident(const Leg &leg) {
    if (!is_for_resident(leg) || !resident_) return false;
    if (resident_->table().acquire(leg.parts.span().table)) return true;
    if (!resident_->table().in_use()) memory_.put_back(std::move(resident_));
    return false;
}

// How the next piece of a leg gets to the host and back.
CudaLane::Way CudaLane::way_of(const Leg &leg, bool urgent) const {
    const kvf_region *block = leg.parts.block();
    if (!block) return memory_.has_staging() ? Way::Gather : Way::Run;
    if (block->rows == 1 || block->width >= kUrgentBytes) return Way::Run;
    const uint64_t pitch = std::max(block->pitch, leg.job->pinned ? block->buffer_pitch : 0);
    const bool is_direct = block->width >= kNarrow && pitch <= limits_.max_pitch;
    if (is_direct && !(urgent && is_read_badly(*leg.job, *block))) return Way::Block;
    if (memory_.has_staging() && block->width <= kLongRun) return Way::Gather;
    return pitch <= limits_.max_pitch ? Way::Block : Way::Run;
}

// Rows that are loaded faster through staging.
bool CudaLane::is_read_badly(const Job &job, const kvf_region &block) const {
    if (direction_ == Direction::Save || !job.pinned || block.width >= kWide ||
        block.buffer_pitch != block.width || block.width * block.rows < kLeastRegular)
        return false;
    const uint64_t begin = reinterpret_cast<uint64_t>(job.buffer) + block.offset;
    return (begin | block.width) % kHostLine != 0;
}

// What comes next is a block that is worth a launch of its own.
bool CudaLane::is_regular(const Parts &parts) {
    const kvf_region *block = parts.block();
    return block && block->width * block->rows >= kLeastRegular;
}

CudaLane::Slot *CudaLane::idle_slot() {
    for (Slot &slot : slots_) {
        if (slot.stage == Stage::Idle) return &slot;
    }
    return nullptr;
}

// ---- one piece ---------------------------------------------------------------------------------

// What precedes the copy.
void CudaLane::prepare(Slot &slot) {
    Job &job = *slot.leg->job;
    slot.stage = Stage::Ready;
    if (slot.way == Way::Gather) {
        // Before the data of a load, too: behind it, the table would wait for other slots' copies.
        if (slot.rows == Rows::Resident) {
            resident_->table().send(slot.stream);
        } else if (slot.rows == Rows::Table) {
            CudaRowTable &table = slot.table->table();
            table.clear();
            for (size_t i = 0; i < slot.pieces.size(); ++i) {
                table.add(slot.pieces[i], slot.places[i]);
            }
            table.send(slot.stream);
        }
        if (direction_ == Direction::Save) launch(slot);
    }
    if (direction_ == Direction::Load && !job.pinned) crew_copies(slot, Stage::Filling);
}

uint32_t CudaLane::kernel_blocks() const { return urgent_ ? kUrgentBlocks : kBackgroundBlocks; }

// Queues the kernels that move a slot's rows.
void CudaLane::launch(Slot &slot) {
    const auto launch = [&](const CudaRows &rows) {
        kernels_->launch(direction_, slot.staging.memory, rows, kernel_blocks(), slot.stream);
    };
    if (slot.rows == Rows::Table) return launch(slot.table->table().rows());
    for (size_t i = 0; i < slot.pieces.size(); ++i) {
        const Piece &piece = slot.pieces[i];
        if (slot.rows == Rows::Resident) {
            launch(resident_->table().rows(piece, slot.places[i]));
            continue;
        }
        CudaRows rows;
        rows.count = static_cast<uint32_t>(piece.block.rows);
        rows.address_distance = piece.block.address;
        rows.offset_distance = static_cast<uint32_t>(slot.places[i]);
        rows.pitch = piece.block.pitch;
        rows.width = static_cast<uint32_t>(piece.block.width);
        launch(rows);
    }
}

// Has the crew copy between the bounce buffer and the job's.
void CudaLane::crew_copies(Slot &slot, Stage stage) {
    slot.crew_done.store(false, std::memory_order_relaxed);
    slot.stage = stage;
    crew_.add([this, &slot, buffer = slot.leg->job->buffer] {
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

void CudaLane::queue_copy(Slot &slot) {
    Job &job = *slot.leg->job;
    slot.queued_ns = now_ns();
    if (!job.stopping()) {
        if (slot.way == Way::Gather) {
            copy_gathered(slot);
        } else {
            copy_direct(slot);
        }
    }
    driver_.check(driver_.cuEventRecord(slot.copied, slot.stream), "cuEventRecord");
    slot.stage = Stage::Copying;
    ++copies_queued_;
    bytes_queued_ += slot.bytes;
    if (direction_ == Direction::Load && slot.way == Way::Gather) {
        if (!job.stopping()) launch(slot);
        driver_.check(driver_.cuEventRecord(slot.finished, slot.stream), "cuEventRecord");
    }
}

// Between the cache and the host.
void CudaLane::copy_direct(Slot &slot) {
    Job &job = *slot.leg->job;
    unsigned char *packed = slot.bounce ? slot.bounce->memory() : nullptr;
    for (const Piece &piece : slot.pieces) {
        if (piece.runs) {
            const Run run = piece.run(0);
            copy_run(slot, run.address, job.pinned ? job.buffer + run.offset : packed, run.bytes);
        } else if (job.pinned) {
            const kvf_region &block = piece.block;
            copy_rows(slot, block.address, block.pitch, job.buffer + block.offset,
                      block.buffer_pitch, block.width, block.rows);
        } else {
            const kvf_region &block = piece.block;
            copy_rows(slot, block.address, block.pitch, packed, block.width, block.width,
                      block.rows);
        }
        packed += piece.bytes;
    }
}

// Between staging and the host.
void CudaLane::copy_gathered(Slot &slot) {
    Job &job = *slot.leg->job;
    const CUdeviceptr staging = slot.staging.memory;
    if (!job.pinned) return copy_run(slot, staging, slot.bounce->memory(), slot.bytes);
    // What has one distance between staging and the buffer is one copy, across pieces too.
    uint64_t place = 0, offset = 0, bytes = 0;
    bool has_room = false; // before it, for the rest of its line in the host
    const auto flush = [&] {
        if (!bytes) return;
        const auto begin = reinterpret_cast<uint64_t>(job.buffer) + offset;
        const uint64_t before = has_room ? std::min(begin % kHostLine, offset) : 0;
        copy_run(slot, staging + place - before, job.buffer + offset - before, bytes + before);
        bytes = 0;
    };
    const auto extend = [&](uint64_t next_place, uint64_t next_offset, uint64_t next_bytes,
                            bool is_first) {
        const bool follows = bytes && next_place - place == next_offset - offset;
        if (!follows) {
            flush();
            place = next_place;
            offset = next_offset;
            has_room = is_first && direction_ == Direction::Load;
        }
        bytes = next_place + next_bytes - place;
    };
    for (size_t i = 0; i < slot.pieces.size(); ++i) {
        const Piece &piece = slot.pieces[i];
        const kvf_region &block = piece.block;
        uint64_t at = slot.places[i];
        if (piece.is_packed()) {
            extend(at, piece.offset(), piece.bytes, true);
        } else if (piece.runs) {
            for (uint64_t k = 0; k < piece.count; ++k) {
                const Run run = piece.run(k);
                extend(at, run.offset, run.bytes, k == 0);
                at += run.bytes;
            }
        } else if (block.buffer_pitch > limits_.max_pitch) {
            for (uint64_t k = 0; k < block.rows; ++k) {
                extend(at, block.offset + k * block.buffer_pitch, block.width, k == 0);
                at += block.width;
            }
        } else {
            flush();
            copy_rows(slot, staging + at, block.width, job.buffer + block.offset,
                      block.buffer_pitch, block.width, block.rows);
        }
    }
    flush();
}

void CudaLane::copy_run(Slot &slot, CUdeviceptr address, unsigned char *host, uint64_t bytes) {
    if (direction_ == Direction::Save) {
        driver_.check(driver_.cuMemcpyDtoHAsync(host, address, bytes, slot.stream),
                      "cuMemcpyDtoHAsync");
    } else {
        driver_.check(driver_.cuMemcpyHtoDAsync(address, host, bytes, slot.stream),
                      "cuMemcpyHtoDAsync");
    }
}

void CudaLane::copy_rows(Slot &slot, CUdeviceptr address, uint64_t pitch, unsigned char *host,
                         uint64_t host_pitch, uint64_t width, uint64_t rows) {
    if (rows == 1) return copy_run(slot, address, host, width);
    CUDA_MEMCPY2D copy{};
    copy.WidthInBytes = width;
    copy.Height = rows;
    if (direction_ == Direction::Save) {
        copy.srcMemoryType = CU_MEMORYTYPE_DEVICE;
        copy.srcDevice = address;
        copy.srcPitch = pitch;
        copy.dstMemoryType = CU_MEMORYTYPE_HOST;
        copy.dstHost = host;
        copy.dstPitch = host_pitch;
    } else {
        copy.srcMemoryType = CU_MEMORYTYPE_HOST;
        copy.srcHost = host;
        copy.srcPitch = host_pitch;
        copy.dstMemoryType = CU_MEMORYTYPE_DEVICE;
        copy.dstDevice = address;
        copy.dstPitch = pitch;
    }
    driver_.check(driver_.cuMemcpy2DAsync(&copy, slot.stream), "cuMemcpy2DAsync");
}

void CudaLane::leave_queue(const Slot &slot) {
    --copies_queued_;
    bytes_queued_ -= slot.bytes;
}

// The device has done its part.
void CudaLane::after_device(Slot &slot) {
    Job &job = *slot.leg->job;
    if (direction_ == Direction::Load || job.pinned || job.stopping()) return end_piece(slot);
    attempt(slot, [&] { crew_copies(slot, Stage::Draining); });
}

void CudaLane::end_piece(Slot &slot) {
    Leg &leg = *slot.leg;
    Job &job = *leg.job;
    engine_.trace(job, slot.queued_ns ? slot.queued_ns : slot.begin_ns, now_ns(), slot.bytes,
                  device_);
    if (slot.staging && slot.rows == Rows::Resident) {
        resident_->table().release();
        if (!resident_->table().in_use()) memory_.put_back(std::move(resident_));
    }
    give_back(slot);
    slot.stage = Stage::Idle;
    slot.leg = nullptr;
    --pieces_;
    std::unique_lock lock(mutex_);
    const bool ended = schedule_.give_back(leg);
    lock.unlock();
    if (ended) job.leg_ended(leg);
}

// ---- trouble -----------------------------------------------------------------------------------

// Runs a step of a piece; if it fails, the piece's job does.
template <class Function>
void CudaLane::attempt(Slot &slot, Function &&function) {
    try {
        if (broken()) throw Error(KVF_ERR_DEVICE_LOST, why_broken_);
        function();
    } catch (const Error &error) {
        fail_piece(slot, error);
    } catch (const std::exception &) {
        fail_piece(slot, Error(KVF_ERR_OUT_OF_MEMORY));
    }
}

void CudaLane::fail_piece(Slot &slot, const Error &error) {
    slot.leg->job->fail(error.status, error.detail);
    if (error.status == KVF_ERR_DEVICE_LOST) break_down(error);
    engine_.poke(); // the rest of the job, on other devices too, need not be moved
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
    Schedule::Legs ended;
    {
        std::lock_guard lock(mutex_);
        try {
            if (!broken()) why_broken_ = error.detail;
        } catch (const std::bad_alloc &) {
            // That it is broken must do.
        }
        broken_.store(true, std::memory_order_release);
        schedule_.for_each([&](Leg &leg) { leg.job->fail(KVF_ERR_DEVICE_LOST, error.detail); });
        for (Slot &slot : slots_) {
            if (slot.leg) slot.leg->job->fail(KVF_ERR_DEVICE_LOST, error.detail);
        }
        schedule_.sweep(ended);
    }
    for (Leg *leg : ended) leg->job->leg_ended(*leg);
}

} // namespace kvf
