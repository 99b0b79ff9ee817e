// What a lane moves at a time: pieces of one leg, with a stream of their own and the memory that
// they use.
#pragma once

#include <atomic>
#include <vector>

#include "cuda/lane_memory.h"
#include "jobs/job.h"

namespace kvf {

// How pieces get to the host and back: as runs; as two-dimensional copies; through staging and a
// kernel.
enum class CudaWay { Run, Rows, Staged };
constexpr size_t kCudaWays = 3;

// Where a kernel finds its rows.
enum class CudaRowsIn {
    Pieces,   // each piece is a region and needs no table
    Resident, // each piece is of the resident table
    Table,    // all pieces are in a table of the slot's own
};

struct CudaSlot {
    enum class Stage {
        Idle,
        Filling,   // copy threads fill the bounce buffer
        Ready,     // the copy may be queued
        Copying,   // the copy is queued or under way
        Finishing, // the stream still holds something else, which must end
        Draining,  // copy threads empty the bounce buffer
    };

    Stage stage = Stage::Idle;
    CUstream stream = nullptr;
    CUevent copied = nullptr, finished = nullptr;

    Leg *leg = nullptr;
    CudaWay way = CudaWay::Run;
    // All of one way. Small pieces go together, since each copy costs the copy engine some
    // microseconds.
    std::vector<Piece> pieces;
    uint64_t bytes = 0; // of all pieces

    // Where the way is Staged.
    CudaRowsIn rows_in = CudaRowsIn::Table;
    std::vector<uint64_t> places; // of the pieces in staging

    // The lane's, while the slot needs them.
    CudaSegment staging;
    std::unique_ptr<CudaRowTable> table;
    std::unique_ptr<CudaPinnedMemory> bounce; // for a pageable buffer

    uint32_t epoch = 0; // of the pacer, when the pieces were taken
    std::atomic<bool> host_copied{false};
    uint64_t begin_ns = 0, queued_ns = 0;
};

} // namespace kvf
