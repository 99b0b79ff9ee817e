// Decides which pieces of a leg a slot takes, which way they go, and where they lie in staging; and
// acquires the memory that the slot needs for them. For the pump alone, while it holds the lock of
// its schedule.
#pragma once

#include "cuda/slot.h"

namespace kvf {

class CudaPlanner {
public:
    // The most bytes that an urgent slot takes at once. To queue costs little compared with moving
    // so much, and a cancelled job still stops within a millisecond.
    static constexpr uint64_t kUrgentBytes = 16 << 20;
    static constexpr size_t kMostPieces = 64; // of a slot

    // The copy engine reads whole lines of this many bytes from the host: a copy that begins within
    // a line costs one line more. (Where the engine writes, a copy may begin anywhere.) Therefore
    // pieces that are loaded and do not follow one another have room for a line before them in
    // staging, so that a copy can begin with the whole line.
    static constexpr uint64_t kHostLine = 256;

    CudaPlanner(Direction direction, CudaLaneMemory &memory, uint64_t max_pitch)
        : direction_(direction), memory_(memory), max_pitch_(max_pitch) {}

    // Returns which way the next piece of a leg goes.
    CudaWay way_of(const Leg &leg, bool urgent) const;
    // Whether the pump should wait until more of an urgent leg is recorded, while the device is
    // busy: pieces that are staged should be large.
    bool is_worth_waiting(const Leg &leg) const;

    // The memory that is missing.
    enum class Missing { Nothing, Staging, Segment, Resident, Table, Bounce };
    // Acquires the memory that a slot needs for pieces of its way, which have `most_bytes` at most
    // together. If something is missing, the slot has no memory afterwards.
    Missing acquire_memory(CudaSlot &slot, const Leg &leg, bool urgent, uint64_t most_bytes);
    void release_memory(CudaSlot &slot);
    // Moves pieces of the leg into the slot, which has its memory. Cannot fail, since the slot's
    // vectors have room.
    void take(CudaSlot &slot, Leg &leg, bool urgent, uint64_t most);

    // Call only while a slot uses the resident table.
    CudaResidentTable &resident() const { return *resident_; }

private:
    bool is_read_badly(const Job &job, const kvf_region &region) const;
    static bool is_regular(const Parts &parts);
    static bool is_for_resident(const Leg &leg);
    bool is_gathered(const Leg &leg) const;
    bool fills_gaps(const Leg &leg) const;
    bool may_bridge(const CudaSlot &slot, const Piece &piece) const;
    Missing acquire_staging(CudaSlot &slot, const Leg &leg, bool urgent, uint64_t most_bytes);
    Missing acquire_rows(CudaSlot &slot, const Leg &leg);
    bool acquire_resident(const Leg &leg);
    bool goes_with(const CudaSlot &slot, const Leg &leg, bool urgent) const;
    uint64_t room_for_next(const CudaSlot &slot, const Parts &parts, uint64_t most,
                           uint64_t rows_left) const;
    // How the rows of a piece stand in a table, and what moves them.
    enum class Rows {
        Long,   // one row, of which every block of the kernel moves a part
        Shaped, // one row for the whole region, by a launch for regions of one shape
        Many,   // each row, moved by one block
    };
    static Rows rows_of_next(const CudaSlot &slot, const Parts &parts);
    // What the slot's pieces have taken of its table, if it has one.
    struct TableUse {
        uint64_t rows_left;
        bool has_long = false, has_many = false;

        // Among many rows a kernel would leave the long ones to few of its blocks.
        bool excludes(Rows rows) const {
            return has_long ? rows == Rows::Many : has_many && rows == Rows::Long;
        }
    };
    static void take_rows(CudaSlot &slot, const Piece &piece, Rows rows, uint64_t gap_rows,
                          TableUse &table);
    uint64_t place(const CudaSlot &slot, const Job &job, const Piece &piece) const;

    const Direction direction_;
    CudaLaneMemory &memory_;
    const uint64_t max_pitch_;
    std::unique_ptr<CudaResidentTable> resident_; // while a slot uses it
};

} // namespace kvf
