// How the pieces of one slot move, step by step; and what happens when a step fails.
#include <algorithm>
#include <new>

#include "cuda/lane.h"
#include "memory/copy.h"

namespace kvf {
namespace {

// Blocks of a kernel's grid.
constexpr uint32_t kUrgentBlocks = 64, kBackgroundBlocks = 32;

} // namespace

// ---- The way of a piece ------------------------------------------------------------------------

// Takes the steps before the copy.
void CudaLane::begin_piece(CudaSlot &slot) {
    slot.begin_ns = now_ns();
    slot.queued_ns = 0;
    ++pieces_;
    Job &job = *slot.leg->job;
    job.note_started(slot.begin_ns);
    attempt(slot, [&] {
        slot.stage = Stage::Ready;
        if (slot.way == CudaWay::Staged) {
            // A load's table is sent now, too: behind the load's data, the table would wait for the
            // copies of other slots.
            copies_.send_table(slot);
            if (direction_ == Direction::Save) copies_.launch(slot, kernel_blocks());
        }
        if (direction_ == Direction::Load && !job.request.pinned)
            start_host_copy(slot, Stage::Filling);
    });
}

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

void CudaLane::queue_copy(CudaSlot &slot) {
    attempt(slot, [&] {
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
    });
}

uint32_t CudaLane::kernel_blocks() const { return urgent_ ? kUrgentBlocks : kBackgroundBlocks; }

// Takes the piece's next step if the device has done the current one. Returns false if it has not.
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
    // If a staged load has been copied, it now waits for its scatter kernel.
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

// The device has done its part of a piece.
void CudaLane::after_device(CudaSlot &slot) {
    Job &job = *slot.leg->job;
    if (direction_ == Direction::Load || job.request.pinned || job.stopping())
        return end_piece(slot);
    attempt(slot, [&] { start_host_copy(slot, Stage::Draining); });
}

void CudaLane::end_piece(CudaSlot &slot) {
    Leg &leg = *slot.leg;
    Job &job = *leg.job;
    owner_.trace(job, slot.queued_ns ? slot.queued_ns : slot.begin_ns, now_ns(), slot.bytes,
                 device_);
    planner_.release_memory(slot);
    if (leg.load_ahead) leg.load_ahead->staged_up_to(staged_up_to(slot));
    job.moved(slot.pieces);
    slot.stage = Stage::Idle;
    slot.leg = nullptr;
    --pieces_;
    schedule_.piece_ended(leg);
}

// Returns how many bytes of a load ahead are staged from its beginning on, once those of this slot
// are.
uint64_t CudaLane::staged_up_to(const CudaSlot &slot) {
    uint64_t bytes = schedule_.bytes_taken(*slot.leg);
    for (const CudaSlot &other : slots_) {
        if (&other == &slot || other.leg != slot.leg) continue;
        const LoadAhead &load_ahead = *slot.leg->load_ahead;
        bytes = std::min(bytes, load_ahead.bytes_before(other.pieces.front().offset()));
    }
    return bytes;
}

// ---- Failures ----------------------------------------------------------------------------------

// Takes a step of a piece. If the step fails, the piece's job fails.
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
    // The failed step may have queued something that uses the buffer. The piece ends when that has
    // ended.
    if (!broken() && driver_.cuEventRecord(slot.finished, slot.stream) == CUDA_SUCCESS) {
        slot.stage = Stage::Finishing;
        if (!slot.queued_ns) slot.queued_ns = now_ns();
        return;
    }
    end_piece(slot);
}

// A copy does not end. From now on the device may access the buffers of all pieces that move, at
// any time.
void CudaLane::give_up() {
    context_.give_up();
    for (CudaSlot &slot : slots_) {
        if (slot.leg) slot.leg->job->mark_buffer_lost();
    }
    break_down(Error(KVF_ERR_DEVICE_LOST, "a copy did not end"));
}

// The device is lost, and all legs fail: those in the schedule end now, and those with pieces in
// slots when the pump looks at the slots next.
void CudaLane::break_down(const Error &error) {
    context_.note_lost();
    {
        const std::unique_lock lock = schedule_.lock();
        try {
            if (!broken()) why_broken_ = error.detail;
        } catch (const std::bad_alloc &) {
            // There is no memory for the reason. The status tells that the device is lost.
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
