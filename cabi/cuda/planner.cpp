#include "cuda/planner.h"

#include <algorithm>
#include <utility>

namespace kvf {
namespace {

// A shorter stretch of the irregular rest, or a smaller region, is not worth a launch of its own.
constexpr uint64_t kLeastResident = 64; // runs
constexpr uint64_t kLeastRegular = 512 << 10;
// Rows narrower than this are gathered: the copy engine moves them slower than the link.
constexpr uint64_t kNarrow = 1024;
// Rows of this width are read well wherever they begin, since one line more hardly matters. (An
// H200 loaded rows of 2 KiB at offsets that are not multiples of a line at 0.966 of the raw speed,
// others at 0.990.)
constexpr uint64_t kWide = 8 << 10;
// A smaller region is gathered where one copy can then move several: a copy of its own costs the
// copy engine 2 to 3 us, in which the link moves 0.15 MiB.
constexpr uint64_t kLeastAlone = 4 << 20;
// The room that a gap takes in a table: a row, and the bytes.
constexpr uint64_t kGapRows = 1 + kBridge / sizeof(kvferry_row);
// What a piece may need in staging beside its bytes: the beginning of its first line in the host,
// and alignment.
constexpr uint64_t kPieceRoom = 2 * CudaPlanner::kHostLine;
static_assert(kBridge <= kPieceRoom && CudaPlanner::kHostLine <= CudaArena::kAlignment);
constexpr uint64_t kLeastSegment = 128 << 10;
static_assert(kLeastSegment >= kLongRun + kPieceRoom && 2 * kLeastSegment <= CudaArena::kLeast);

// The most rows that the slot can take, where a table limits them.
uint64_t most_rows(const CudaSlot &slot) {
    if (slot.way != CudaWay::Staged) return 1;
    return slot.rows_in == CudaRowsIn::Resident ? CudaResidentTable::kRows : CudaRowTable::kRows;
}

// Where the pieces that have their places in staging end.
uint64_t end_in_staging(const CudaSlot &slot) {
    const size_t count = slot.places.size();
    return count ? slot.places.back() + slot.pieces[count - 1].bytes : 0;
}

} // namespace

bool CudaPlanner::is_worth_waiting(const Leg &leg) const {
    return !leg.parts.is_closed() &&
           leg.parts.left() < std::min(kUrgentBytes, memory_.staging_bytes() / 2) &&
           way_of(leg, true) == CudaWay::Staged;
}

CudaPlanner::Missing CudaPlanner::acquire_memory(CudaSlot &slot, const Leg &leg, bool urgent,
                                                 uint64_t most_bytes) {
    if (!leg.job->request.pinned) {
        slot.bounce = memory_.acquire_bounce();
        if (!slot.bounce) return Missing::Bounce;
    }
    if (slot.way != CudaWay::Staged) return Missing::Nothing;
    slot.rows_in = CudaRowsIn::Table;
    Missing missing = acquire_staging(slot, leg, urgent, most_bytes);
    if (missing == Missing::Nothing) missing = acquire_rows(slot, leg);
    if (missing != Missing::Nothing) release_memory(slot);
    return missing;
}

// Urgent pieces share staging by two: one is copied while the kernel has the other. In the
// background a piece is made ready behind those in the queue.
CudaPlanner::Missing CudaPlanner::acquire_staging(CudaSlot &slot, const Leg &leg, bool urgent,
                                                  uint64_t most_bytes) {
    const uint64_t all = memory_.staging_bytes();
    if (all == 0) return Missing::Staging;
    uint64_t wanted = urgent ? std::min(most_bytes, leg.parts.left()) : most_bytes;
    if (slot.bounce) wanted = std::min(wanted, slot.bounce->bytes()); // more slots instead
    wanted += kMostPieces * kPieceRoom;
    const uint64_t most =
        std::clamp(wanted, kLeastSegment, std::max(all / (urgent ? 2 : 4), kLeastSegment));
    const uint64_t least =
        urgent ? std::clamp(most, kLeastSegment, std::max(all / 4, kLeastSegment)) : most;
    slot.staging = memory_.acquire_staging(least, most);
    return slot.staging ? Missing::Nothing : Missing::Segment;
}

// Decides where the kernel finds the slot's rows.
CudaPlanner::Missing CudaPlanner::acquire_rows(CudaSlot &slot, const Leg &leg) {
    if (fills_gaps(leg) || (leg.parts.region() && is_gathered(leg))) {
        slot.table = memory_.acquire_rows();
        return slot.table ? Missing::Nothing : Missing::Table;
    }
    if (is_regular(leg.parts)) {
        slot.rows_in = CudaRowsIn::Pieces;
        return Missing::Nothing;
    }
    if (is_for_resident(leg) && !resident_) {
        resident_ = memory_.acquire_resident();
        if (!resident_ && memory_.has_resident()) return Missing::Resident;
    }
    if (acquire_resident(leg)) {
        slot.rows_in = CudaRowsIn::Resident;
        return Missing::Nothing;
    }
    slot.table = memory_.acquire_rows();
    return slot.table ? Missing::Nothing : Missing::Table;
}

void CudaPlanner::release_memory(CudaSlot &slot) {
    if (slot.staging && slot.rows_in == CudaRowsIn::Resident) {
        resident_->release();
        if (!resident_->in_use()) memory_.release(std::move(resident_));
    }
    memory_.release(std::exchange(slot.staging, {}));
    memory_.release(std::move(slot.table));
    memory_.release(std::move(slot.bounce));
}

void CudaPlanner::take(CudaSlot &slot, Leg &leg, bool urgent, uint64_t most) {
    Parts &parts = leg.parts;
    if (slot.bounce) most = std::min(most, slot.bounce->bytes());
    TableUse table{most_rows(slot)};
    slot.pieces.clear();
    slot.places.clear();
    slot.shape = {};
    slot.bytes = 0;
    do {
        const uint64_t bytes = room_for_next(slot, parts, most, table.rows_left);
        if (bytes == 0) break;
        const Rows rows = rows_of_next(slot, parts);
        if (table.excludes(rows)) break;
        const Piece &piece = slot.pieces.emplace_back(parts.next(bytes, table.rows_left));
        slot.bytes += piece.bytes;
        if (slot.way != CudaWay::Staged) continue;
        slot.places.push_back(place(slot, *leg.job, piece));
        if (slot.rows_in == CudaRowsIn::Table)
            take_rows(slot, piece, rows, fills_gaps(leg) ? kGapRows : 0, table);
    } while (!parts.empty() && slot.bytes < most && table.rows_left > 0 &&
             slot.pieces.size() < kMostPieces && goes_with(slot, leg, urgent));
}

// Takes the rows that a piece needs in the slot's table, and `gap_rows` for the gap before it.
void CudaPlanner::take_rows(CudaSlot &slot, const Piece &piece, Rows rows, uint64_t gap_rows,
                            TableUse &table) {
    if (rows == Rows::Shaped && slot.shape.rows == 0) slot.shape = CudaShape::of(piece.region);
    const bool is_shaped = slot.is_shaped(piece);
    table.has_long |= rows == Rows::Long;
    table.has_many |= rows != Rows::Long && !is_shaped;
    const uint64_t taken = (is_shaped ? 1 : piece.rows()) + gap_rows;
    table.rows_left -= std::min(table.rows_left, taken);
}

// Whether the leg's next piece goes the way of the slot's pieces, and the kernel finds its rows
// where it finds theirs.
bool CudaPlanner::goes_with(const CudaSlot &slot, const Leg &leg, bool urgent) const {
    if (way_of(leg, urgent) != slot.way) return false;
    if (slot.way != CudaWay::Staged) return true;
    switch (slot.rows_in) {
    case CudaRowsIn::Pieces: return is_regular(leg.parts);
    case CudaRowsIn::Resident:
        return !leg.parts.region() && leg.parts.span().table == *slot.pieces.back().table;
    case CudaRowsIn::Table: break;
    }
    return true;
}

// The most bytes that the slot can take as its next piece; 0 where it should take none.
uint64_t CudaPlanner::room_for_next(const CudaSlot &slot, const Parts &parts, uint64_t most,
                                    uint64_t rows_left) const {
    const bool is_first = slot.pieces.empty(), is_staged = slot.way == CudaWay::Staged;
    uint64_t bytes = most - slot.bytes;
    if (is_staged) {
        const uint64_t room = slot.staging.bytes - end_in_staging(slot);
        bytes = std::min(bytes, room - std::min(room, kPieceRoom));
    }
    const kvf_region *region = parts.region();
    if (!region) {
        const bool might_not_fit = bytes < std::min(kLongRun, parts.left());
        return !is_first && might_not_fit ? 0 : bytes;
    }
    if (slot.way == CudaWay::Run) return std::min(bytes, region->width);
    if (is_staged && !is_first && region->width > bytes) {
        const bool is_worth_splitting = region->rows == 1 && bytes >= kLongRun;
        return is_worth_splitting ? bytes : 0;
    }
    if (is_staged && slot.rows_in == CudaRowsIn::Table) {
        // A part of a region has another shape than the whole, so that each of its rows would need
        // one of the table.
        const uint64_t whole = region->width * region->rows;
        if (!is_first && region->rows >= kFewRows && whole > bytes && whole < kLeastAlone) return 0;
        return std::min(bytes, region->width * rows_left);
    }
    return bytes;
}

// Where the next piece goes in staging: behind the one before it, and at the distance that it has
// in the host where that is short and one copy may move both. Else a piece that is loaded leaves
// room for the line of the host that it begins in.
uint64_t CudaPlanner::place(const CudaSlot &slot, const Job &job, const Piece &piece) const {
    const size_t count = slot.places.size(); // of the pieces before it
    const uint64_t end = end_in_staging(slot);
    if (!job.request.pinned) return end;
    if (count > 0 && slot.pieces[count - 1].is_packed() && may_bridge(slot, piece)) {
        const Piece &last = slot.pieces[count - 1];
        const uint64_t gap = piece.offset() - (last.offset() + last.bytes);
        if (gap <= kBridge) return end + gap;
    }
    if (direction_ == Direction::Save) return end;
    return (end + kHostLine - 1) / kHostLine * kHostLine + kHostLine;
}

// Whether one copy may move the piece, the one before it, and the gap between them.
bool CudaPlanner::may_bridge(const CudaSlot &slot, const Piece &piece) const {
    if (piece.gap == Piece::Gap::Nothing) return false;
    if (direction_ == Direction::Load) return true;
    return piece.gap == Piece::Gap::Rewrite && slot.rows_in == CudaRowsIn::Table;
}

// Whether the next piece of a save is one that gaps are moved with.
bool CudaPlanner::fills_gaps(const Leg &leg) const {
    return direction_ == Direction::Save && leg.job->request.pinned && leg.parts.owns_gaps();
}

// Whether the next piece is of a region that goes through staging so that one copy moves several.
bool CudaPlanner::is_gathered(const Leg &leg) const {
    const kvf_region &region = *leg.parts.region();
    return memory_.has_staging() && leg.job->request.pinned && leg.parts.owns_gaps() &&
           (region.rows == 1 || region.buffer_pitch == region.width) &&
           region.width * region.rows < kLeastAlone;
}

bool CudaPlanner::is_for_resident(const Leg &leg) {
    return !leg.parts.region() && leg.parts.runs_left() >= kLeastResident;
}

// Acquires the resident table for the next piece of the irregular rest. Returns false where that
// piece cannot use it.
bool CudaPlanner::acquire_resident(const Leg &leg) {
    if (!is_for_resident(leg) || !resident_) return false;
    if (resident_->acquire(leg.parts.span().table)) return true;
    if (!resident_->in_use()) memory_.release(std::move(resident_));
    return false;
}

CudaWay CudaPlanner::way_of(const Leg &leg, bool urgent) const {
    const kvf_region *region = leg.parts.region();
    if (!region) return memory_.has_staging() ? CudaWay::Staged : CudaWay::Run;
    if (is_gathered(leg)) return CudaWay::Staged;
    if (region->rows == 1 || region->width >= kUrgentBytes) return CudaWay::Run;
    const uint64_t pitch =
        std::max(region->pitch, leg.job->request.pinned ? region->buffer_pitch : 0);
    const bool is_direct = region->width >= kNarrow && pitch <= max_pitch_;
    if (is_direct && !(urgent && is_read_badly(*leg.job, *region))) return CudaWay::Rows;
    if (memory_.has_staging() && region->width <= kLongRun) return CudaWay::Staged;
    return pitch <= max_pitch_ ? CudaWay::Rows : CudaWay::Run;
}

// Whether a region is loaded faster through staging.
bool CudaPlanner::is_read_badly(const Job &job, const kvf_region &region) const {
    if (direction_ == Direction::Save || !job.request.pinned || region.width >= kWide ||
        region.buffer_pitch != region.width || region.width * region.rows < kLeastRegular)
        return false;
    const uint64_t begin = reinterpret_cast<uint64_t>(job.request.buffer) + region.offset;
    return (begin | region.width) % kHostLine != 0;
}

CudaPlanner::Rows CudaPlanner::rows_of_next(const CudaSlot &slot, const Parts &parts) {
    const kvf_region *region = parts.region();
    if (!region) return Rows::Many;
    if (region->rows == 1) return Rows::Long;
    const bool is_worth_it = slot.shape.rows == 0 && region->rows >= kFewRows;
    const bool is_shaped = slot.shape == CudaShape::of(*region);
    return slot.rows_in == CudaRowsIn::Table && (is_worth_it || is_shaped) ? Rows::Shaped
                                                                           : Rows::Many;
}

// Whether the next piece is of a region that is worth a launch of its own.
bool CudaPlanner::is_regular(const Parts &parts) {
    const kvf_region *region = parts.region();
    return region && region->rows >= kFewRows && region->width * region->rows >= kLeastRegular;
}

} // namespace kvf
