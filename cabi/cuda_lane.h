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

#include "crew.h"
#include "cuda_lane_memory.h"
#include "pacer.h"
#include "schedule.h"

namespace kvf {

class Engine;

class CudaLane {
public:
    struct Limits {
        uint64_t staging_bytes; // of device memory, over all slots
        uint64_t max_pitch;     // of a two-dimensional copy
    };
    // `kernels` may be NULL: rows are then copied one by one.
    CudaLane(Engine &engine, const CudaContext &context, const CudaKernels *kernels, Crew &crew,
             uint32_t device, Direction direction, Limits limits);
    ~CudaLane();
    CudaLane(const CudaLane &) = delete;
    CudaLane &operator=(const CudaLane &) = delete;

    // As of Device.
    void submit(Leg &leg);
    void extend(Leg &leg, Layout &&part);
    void finish(Leg &leg);
    void expect();
    void poke();
    // Gives back to the system what memory no piece uses at the moment. (A lane that has been idle does so itself.)
    void trim() { memory_.trim(); }
    void stop();
    // Nothing can be moved any more: the device is lost.
    bool broken() const { return broken_.load(std::memory_order_acquire); }
    // The pace of background copies, a JSON object. Any thread.
    std::string describe_pace() const;
    // Host memory of the lane's own that is pinned now. Any thread.
    uint64_t pinned_bytes() const { return memory_.pinned_bytes(); }

private:
    static constexpr size_t kSlots = 8;

    enum class Stage {
        Idle,
        Filling,   // the crew copies in
        Ready,     // its copy may be queued
        Copying,   // its copy is queued or under way
        Finishing, // waits for what else its stream holds
        Draining,  // the crew copies out
    };
    enum class Way { Run, Block, Gather };
    static constexpr size_t kWays = 3;
    // Where the kernels find the rows of a slot.
    enum class Rows {
        Regular,  // each piece is a block, and needs no table
        Resident, // each piece is of the resident table
        Table,    // all are in a table of the slot's own
    };
    // What there is none of at the moment.
    enum class Lack { Nothing, Staging, Segment, Resident, Table, Bounce };

    struct Slot {
        Stage stage = Stage::Idle;
        CUstream stream = nullptr;
        CUevent copied = nullptr, finished = nullptr;

        CudaStaging staging;                   // borrowed for the pieces, where their way needs it
        std::unique_ptr<CudaRowsPlaced> table; // ... where they are Rows::Table
        std::unique_ptr<CudaBounce> bounce;    // ... where the job's buffer is pageable
        Leg *leg = nullptr;
        std::vector<Piece> pieces; // of one way; small ones together, since each copy has its price
        std::vector<uint64_t> places; // of the pieces in staging
        uint64_t bytes = 0;           // of the pieces
        Way way = Way::Run;
        Rows rows = Rows::Table; // where the way is Gather
        uint32_t epoch = 0;      // of the pacer's
        std::atomic<bool> crew_done{false};
        uint64_t begin_ns = 0, queued_ns = 0;
    };

    void pump();
    bool retire();
    bool queue_copies();
    bool refill();
    bool is_worth_waiting(const Leg &leg) const;
    Lack lend(Slot &slot, const Leg &leg, bool urgent);
    void give_back(Slot &slot);
    bool obtain(Lack lack, const std::shared_ptr<Job> &job);
    void wait_for_gates(std::unique_lock<std::mutex> &lock);
    void idle();

    Way way_of(const Leg &leg, bool urgent) const;
    bool is_read_badly(const Job &job, const kvf_region &block) const;
    static bool is_regular(const Parts &parts);
    Slot *idle_slot();
    void prepare(Slot &slot);
    void queue_copy(Slot &slot);
    void leave_queue(const Slot &slot);
    Pacer &pacer(Way way) { return pacers_[static_cast<size_t>(way)]; }
    bool may_queue(const Slot &slot);
    void note_pace(const Slot &slot);
    void after_device(Slot &slot);
    void end_piece(Slot &slot);
    void fail_piece(Slot &slot, const Error &error);
    void break_down(const Error &error);
    template <class Function>
    void attempt(Slot &slot, Function &&function);
    void copy_run(Slot &slot, CUdeviceptr address, unsigned char *host, uint64_t bytes);
    void copy_rows(Slot &slot, CUdeviceptr address, uint64_t pitch, unsigned char *host,
                   uint64_t host_pitch, uint64_t width, uint64_t rows);
    void copy_direct(Slot &slot);
    void copy_gathered(Slot &slot);
    void take_pieces(Slot &slot, Leg &leg, bool urgent);
    uint64_t place(const Slot &slot, const Job &job, const Piece &piece) const;
    static bool is_for_resident(const Leg &leg);
    bool acquire_resident(const Leg &leg);
    void launch(Slot &slot);
    void crew_copies(Slot &slot, Stage stage);
    uint32_t kernel_blocks() const;
    void release(Slot &slot);

    Engine &engine_;
    const CudaContext &context_;
    const CudaDriver &driver_;
    const CudaKernels *const kernels_;
    Crew &crew_;
    const uint32_t device_;
    const Direction direction_;
    const Limits limits_;

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

    // The pump's own.
    std::array<Slot, kSlots> slots_;
    std::unique_ptr<CudaResident> resident_; // while a slot uses it
    uint32_t copies_queued_ = 0;
    uint64_t bytes_queued_ = 0; // of these
    uint32_t pieces_ = 0;       // slots that are not idle
    bool urgent_ = false;       // what is in the slots is
    std::array<Pacer, kWays> pacers_;
    Way last_queued_ = Way::Run;
    uint64_t last_end_ns_ = 0; // of a background copy with more behind it; 0: none
    uint64_t seen_arrivals_ = 0;
    uint64_t gated_since_ns_ =
        0; // for so long there have been legs, and none could begin; 0: there are none such
    std::array<std::atomic<uint64_t>, kWays> pace_bytes_{}; // for describe_pace()
    std::array<std::atomic<uint32_t>, kWays> pace_window_{};
};

} // namespace kvf
