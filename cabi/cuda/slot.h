// A slot of a lane: pieces of one leg that move together, their stream, and the memory that they
// use.
#pragma once

#include <atomic>
#include <vector>

#include "cuda/lane_memory.h"
#include "jobs/job.h"

namespace kvf {

// How pieces move between the device and the host: as runs, as two-dimensional copies, or through
// staging and a kernel.
enum class CudaWay { Run, Rows, Staged };
constexpr size_t kCudaWays = 3;

// Where a kernel finds its rows.
enum class CudaRowsIn {
    Pieces,   // each piece is a region, which needs no table
    Resident, // each piece has its rows in the resident table
    Table,    // the slot has a table of its own for all pieces
};

struct CudaSlot {
    enum class Stage {
        Idle,
        Filling,   // copy threads fill the bounce buffer
        Ready,     // the copy may be queued
        Copying,   // the copy is queued, or moves
        Finishing, // the stream still does something else, which must end
        Draining,  // copy threads empty the bounce buffer
    };

    Stage stage = Stage::Idle;
    CUstream stream = nullptr;
    CUevent copied = nullptr, finished = nullptr;

    Leg *leg = nullptr;
    CudaWay way = CudaWay::Run;
    // All pieces go the same way. Small pieces move together, since each copy costs the copy engine
    // some microseconds.
    std::vector<Piece> pieces;
    uint64_t bytes = 0; // of all pieces

    // Used if the way is Staged.
    CudaRowsIn rows_in = CudaRowsIn::Table;
    std::vector<uint64_t> places; // of the pieces in staging
    // The slot's table has one row for each region of this shape. `shape.rows` is 0 if there is no
    // such region.
    CudaShape shape;
    bool is_shaped(const Piece &piece) const {
        return !piece.runs && shape.rows > 0 && shape == CudaShape::of(piece.region);
    }

    // Memory of the lane, while the slot needs it.
    CudaSegment staging;
    std::unique_ptr<CudaRowTable> table;
    std::unique_ptr<CudaPinnedMemory> bounce; // for a pageable buffer

    uint32_t epoch = 0; // the pacer's, when the pieces were taken
    std::atomic<bool> host_copied{false};
    uint64_t begin_ns = 0, queued_ns = 0;
};

} // namespace kvf
