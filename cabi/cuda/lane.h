// The lane moves the legs of one direction of one CUDA device, piece by piece, on a thread of its
// own: the pump. lane.cpp has the pump's loop, lane_pieces.cpp the way of one piece.
//
// Urgent jobs keep the copy engine's queue filled. Background jobs have one or two copies in the
// queue. llama.cpp copies its inputs and logits at every decode step, and the step waits for all
// that was queued before. (On an H200 with a full queue, a decode step of 5.1 ms became 19.4 ms.)
// The pacer finds how many copies to queue, and how large.
//
// Pieces pass through slots, each of which has a stream of its own:
//
//     save    gather kernel*  ->  copy to the host  ->  copy threads empty the bounce buffer**
//     load    copy threads fill the bounce buffer**  ->  copy to the device  ->  scatter kernel*
//
// *  Only pieces that go through staging on the device: the irregular rest, narrow rows, rows at
//    addresses that the copy engine reads slowly from the host, and small regions of a block, which
//    one copy moves together.
// ** Only for a pageable buffer, which the copy engine cannot reach.
#pragma once

#include <array>
#include <atomic>
#include <string>
#include <thread>

#include "core/thread_pool.h"
#include "cuda/ahead_memory.h"
#include "cuda/copies.h"
#include "cuda/lane_schedule.h"
#include "cuda/pace.h"

namespace kvf {

class CudaLane {
public:
    struct Limits {
        // Device memory that all slots may use together.
        uint64_t staging_bytes;
        // The largest pitch of a two-dimensional copy.
        uint64_t max_pitch;
        CudaPinnedBudget &pinned;
    };
    // `kernels` may be NULL: rows are then copied one by one. `ahead` may be NULL; otherwise the
    // lane trims it when the lane has been idle.
    CudaLane(JobOwner &owner, const CudaContext &context, const CudaKernels *kernels,
             ThreadPool &copy_threads, CudaAheadPool *ahead, uint32_t device, Direction direction,
             Limits limits);
    ~CudaLane();
    CudaLane(const CudaLane &) = delete;
    CudaLane &operator=(const CudaLane &) = delete;

    // As those of Device. Any thread.
    void submit(Leg &leg);
    void extend(Leg &leg, Layout &&part) { schedule_.extend(leg, std::move(part)); }
    void close(Leg &leg) { schedule_.close(leg); }
    void announce() { schedule_.announce(); }
    // Does not wake the pump, which waits for no leg while others can move.
    void cut_short(Leg &leg) { schedule_.cut_short(leg); }
    void cut_short_stopping() { schedule_.cut_short_stopping(); }
    // Frees the memory that no piece uses. (A lane that has been idle does so itself.)
    void trim() { memory_.trim(); }
    void stop();
    // Returns the pace of background copies, as a JSON object. Any thread.
    std::string describe_pace() const { return pace_.describe(); }
    // Returns how much host memory the lane has pinned for itself. Any thread.
    uint64_t pinned_bytes() const { return memory_.pinned_bytes(); }

private:
    static constexpr size_t kSlots = 8;

    using Stage = CudaSlot::Stage;
    using Missing = CudaPlanner::Missing;

    void create(CudaSlot &slot);
    void destroy(CudaSlot &slot);

    // The pump's loop.
    void pump();
    bool poll_slots();
    bool queue_copies();
    bool may_queue(const CudaSlot &slot) const;
    bool refill();
    void trim_idle();
    void wait_for_pieces();

    // New pieces.
    Leg *next_leg();
    CudaSlot *idle_slot();
    bool allocate(Missing missing, const std::shared_ptr<Job> &job);

    // The way of a piece, step by step: lane_pieces.cpp.
    void begin_piece(CudaSlot &slot);
    void start_host_copy(CudaSlot &slot, Stage stage);
    void queue_copy(CudaSlot &slot);
    bool poll_stream(CudaSlot &slot);
    void leave_queue(const CudaSlot &slot);
    void note_pace(const CudaSlot &slot);
    void after_device(CudaSlot &slot);
    void end_piece(CudaSlot &slot);
    uint64_t staged_up_to(const CudaSlot &slot);
    uint32_t kernel_blocks() const;

    // Failures: lane_pieces.cpp.
    template <class Function>
    void attempt(CudaSlot &slot, Function &&function);
    void fail_piece(CudaSlot &slot, const Error &error);
    void give_up();
    void break_down(const Error &error);
    // Whether nothing can be moved any more, since the device is lost.
    bool broken() const { return broken_.load(std::memory_order_acquire); }

    JobOwner &owner_;
    const CudaContext &context_;
    const CudaDriver &driver_;
    ThreadPool &copy_threads_;
    CudaAheadPool *const ahead_;
    const uint32_t device_;
    const Direction direction_;

    CudaLaneSchedule schedule_;
    // Started with the first leg, under the schedule's lock.
    std::thread thread_;
    std::atomic<bool> broken_{false};
    // Written under the schedule's lock.
    std::string why_broken_;

    CudaLaneMemory memory_;
    CudaPlanner planner_;
    const CudaCopies copies_;
    CudaPace pace_;

    // For the pump alone.
    std::array<CudaSlot, kSlots> slots_;
    // How many slots are not idle.
    uint32_t pieces_ = 0;
    // Whether the pieces in the slots are urgent.
    bool urgent_ = false;
    // The copies that are queued and have not ended, and their bytes.
    uint32_t copies_queued_ = 0;
    uint64_t bytes_queued_ = 0;
    // The way of the copy that was queued last.
    CudaWay last_queued_ = CudaWay::Run;
};

} // namespace kvf
