// The pump: moves the legs of one direction of one CUDA device, piece by piece.
//
// Urgent jobs keep the copy engine's queue filled. Background jobs have one or two copies in it, on streams of
// their own: llama.cpp copies its inputs and logits at every step, and a step waits for whatever was queued
// before it (an H200 with a full queue: a decode step of 5.1 ms became 19.4 ms). How many, and how large, is
// the pacer's to find.
//
// Pieces pass through slots, each of which has a stream of its own:
//
//     save    gather kernel*  ->  copy to the host    ->  crew copies out**
//     load    crew copies in**  ->  copy to the device  ->  scatter kernel*
//
// *  for the irregular rest, for narrow rows, and for rows that the copy engine would read from the host at
//    unfavourable addresses: through staging on the device
// ** for a pageable buffer, through a pinned bounce buffer
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <thread>

#include "core/thread_pool.h"
#include "cuda/copies.h"
#include "cuda/landing.h"
#include "cuda/pacer.h"
#include "jobs/schedule.h"

namespace kvf {

class CudaLane {
public:
    struct Limits {
        uint64_t staging_bytes; // of device memory, over all slots
        uint64_t max_pitch;     // of a two-dimensional copy
    };
    // `kernels` may be NULL: rows are then copied one by one. What `landings` keep goes when the lane has been idle; NULL:
    // there are none.
    CudaLane(JobOwner &owner, const CudaContext &context, const CudaKernels *kernels,
             ThreadPool &crew, CudaLandings *landings, uint32_t device, Direction direction,
             Limits limits);
    ~CudaLane();
    CudaLane(const CudaLane &) = delete;
    CudaLane &operator=(const CudaLane &) = delete;

    // As of Device.
    void submit(Leg &leg);
    void extend(Leg &leg, Layout &&part);
    void finish(Leg &leg);
    void announce();
    void cut_short(Leg &leg);
    void cut_short_stopping();
    // Gives back to the system what memory no piece uses at the moment. (A lane that has been idle does so itself.)
    void trim() { memory_.trim(); }
    void stop();
    // The pace of background copies, a JSON object. Any thread.
    std::string describe_pace() const;
    // Host memory of the lane's own that is pinned now. Any thread.
    uint64_t pinned_bytes() const { return memory_.pinned_bytes(); }

private:
    static constexpr size_t kSlots = 8;

    using Stage = CudaSlot::Stage;
    using Lack = CudaPlanner::Lack;

    void pump();
    bool retire();
    bool queue_copies();
    bool refill();
    bool obtain(Lack lack, const std::shared_ptr<Job> &job);
    bool ask_gates();
    void wait_for_gates(std::unique_lock<std::mutex> &lock);
    void idle();

    CudaSlot *idle_slot();
    void prepare(CudaSlot &slot);
    void queue_copy(CudaSlot &slot);
    void leave_queue(const CudaSlot &slot);
    Pacer &pacer(CudaWay way) { return pacers_[static_cast<size_t>(way)]; }
    bool may_queue(const CudaSlot &slot);
    void note_pace(const CudaSlot &slot);
    void after_device(CudaSlot &slot);
    void end_piece(CudaSlot &slot);
    uint64_t moved_before(const CudaSlot &slot);
    void fail_piece(CudaSlot &slot, const Error &error);
    // Nothing can be moved any more: the device is lost.
    bool broken() const { return broken_.load(std::memory_order_acquire); }
    void break_down(const Error &error);
    template <class Function>
    void attempt(CudaSlot &slot, Function &&function);
    void crew_copies(CudaSlot &slot, Stage stage);
    uint32_t kernel_blocks() const;
    void release(CudaSlot &slot);

    JobOwner &owner_;
    const CudaContext &context_;
    const CudaDriver &driver_;
    ThreadPool &crew_;
    CudaLandings *const landings_;
    const uint32_t device_;
    const Direction direction_;

    std::mutex mutex_;
    std::condition_variable work_;
    Schedule schedule_;
    bool stopping_ = false;
    bool crew_ended_ = false;        // since the pump last looked
    uint64_t expected_until_ns_ = 0; // a leg may come any moment
    uint64_t arrivals_ = 0;          // of legs, of parts of legs, of requests to look again
    std::string why_broken_;
    std::thread thread_; // started with the first leg
    std::atomic<bool> broken_{false};

    CudaLaneMemory memory_;
    CudaPlanner planner_;
    const CudaCopies copies_;

    // The pump's own.
    std::array<CudaSlot, kSlots> slots_;
    uint32_t copies_queued_ = 0;
    uint64_t bytes_queued_ = 0; // of these
    uint32_t pieces_ = 0;       // slots that are not idle
    bool urgent_ = false;       // what is in the slots is
    std::array<Pacer, kCudaWays> pacers_;
    CudaWay last_queued_ = CudaWay::Run;
    uint64_t last_end_ns_ = 0; // of a background copy with more behind it; 0: none
    uint64_t seen_arrivals_ = 0;
    uint64_t gated_since_ns_ =
        0; // for so long there have been legs, and none could begin; 0: there are none such
    bool follows_streams_ = false;    // some leg does, as of the last refill()
    std::array<bool, 2> all_asked_{}; // by priority: all gates, since the pump last waited for them
    uint64_t asked_ns_ = 0;           // when it last asked some
    uint64_t asking_ns_ = 0; // how long that has taken since it last waited, while nothing moved
    std::array<std::atomic<uint64_t>, kCudaWays> pace_bytes_{}; // for describe_pace()
    std::array<std::atomic<uint32_t>, kCudaWays> pace_window_{};
};

} // namespace kvf
