// What a lane moves at a time: pieces of one leg, with a stream of their own and the memory that they borrow.
#pragma once

#include <atomic>
#include <vector>

#include "cuda/lane_memory.h"
#include "jobs/job.h"

namespace kvf {

// How pieces get to the host and back: as runs; as two-dimensional copies; through staging and a kernel.
enum class CudaWay { Run, Block, Gather };
constexpr size_t kCudaWays = 3;

// Where a kernel finds its rows.
enum class CudaRowsIn {
    Pieces,   // each piece is a block, and needs no table
    Resident, // each piece is of the resident table
    Table,    // all are in a table of the slot's own
};

struct CudaSlot {
    enum class Stage {
        Idle,
        Filling,   // the crew copies in
        Ready,     // its copy may be queued
        Copying,   // its copy is queued or under way
        Finishing, // waits for what else its stream holds
        Draining,  // the crew copies out
    };

    Stage stage = Stage::Idle;
    CUstream stream = nullptr;
    CUevent copied = nullptr, finished = nullptr;

    Leg *leg = nullptr;
    CudaWay way = CudaWay::Run;
    std::vector<Piece> pieces; // of one way; small ones together, since each copy has its price
    uint64_t bytes = 0;        // of them
    CudaRowsIn rows_in = CudaRowsIn::Table; // where the way is Gather; and then:
    std::vector<uint64_t> places;           // of the pieces in staging

    // Borrowed, where it is needed.
    CudaStaging staging;
    std::unique_ptr<CudaRowsPlaced> table;
    std::unique_ptr<CudaBounce> bounce; // for a pageable buffer

    uint32_t epoch = 0; // of the pacer's
    std::atomic<bool> crew_done{false};
    uint64_t begin_ns = 0, queued_ns = 0;
};

} // namespace kvf
