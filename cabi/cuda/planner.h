// Decides what a slot of a lane takes of a leg, which way that goes, and where in staging it lies; and lends it the memory
// that it needs for that. For the pump alone, under the lock of its schedule.
#pragma once

#include "cuda/slot.h"

namespace kvf {

class CudaPlanner {
public:
    // What an urgent slot takes at once: so much that queuing it costs nothing beside moving it, and yet a cancelled
    // job stops within a millisecond.
    static constexpr uint64_t kUrgentBytes = 16 << 20;
    static constexpr size_t kMostPieces = 64; // of a slot

    // The copy engine reads whole lines of the host: what begins between two of them costs one more. What it writes may
    // begin anywhere. So where pieces that are loaded do not follow one another, they have room for a line before
    // them in staging, and a copy may begin with what precedes them on theirs in the host.
    static constexpr uint64_t kHostLine = 256;

    CudaPlanner(Direction direction, CudaLaneMemory &memory, uint64_t max_pitch)
        : direction_(direction), memory_(memory), max_pitch_(max_pitch) {}

    // How the next piece of a leg gets to the host and back.
    CudaWay way_of(const Leg &leg, bool urgent) const;
    // What is staged for urgent jobs is taken in large pieces: rather than a small one, what is still being recorded, if
    // the device has something to do meanwhile.
    bool is_worth_waiting(const Leg &leg) const;

    // What there is none of at the moment.
    enum class Lack { Nothing, Staging, Segment, Resident, Table, Bounce };
    // Lends a slot the memory that pieces of its way need, for so many bytes at most.
    Lack lend(CudaSlot &slot, const Leg &leg, bool urgent, uint64_t most_bytes);
    // Fills it with pieces. Must not fail: the slot's vectors have room.
    void take(CudaSlot &slot, Leg &leg, bool urgent, uint64_t most);
    // What was lent.
    void give_back(CudaSlot &slot);

    // While a slot has rows in it.
    CudaResidentTable &resident() const { return resident_->table(); }

private:
    bool is_read_badly(const Job &job, const kvf_region &block) const;
    static bool is_regular(const Parts &parts);
    static bool is_for_resident(const Leg &leg);
    bool acquire_resident(const Leg &leg);
    uint64_t place(const CudaSlot &slot, const Job &job, const Piece &piece) const;

    const Direction direction_;
    CudaLaneMemory &memory_;
    const uint64_t max_pitch_;
    std::unique_ptr<CudaResident> resident_; // while a slot uses it
};

} // namespace kvf
