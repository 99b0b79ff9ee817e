#include "cuda/planner.h"

#include <algorithm>
#include <utility>

namespace kvf {
namespace {

// A shorter stretch of the irregular rest, or a smaller block, is not worth a launch of its own.
constexpr uint64_t kLeastResident = 64;
constexpr uint64_t kLeastRegular = 512 << 10;
// Rows narrower than this are gathered: the copy engine moves them slower than the link.
constexpr uint64_t kNarrow = 1024;
// Rows of this width are read well wherever they begin: one line more each hardly matters. (An H200: rows of 2 KiB at
// offsets that are not multiples of a line were loaded at 0.966 of the raw speed, others at 0.990.)
constexpr uint64_t kWide = 8 << 10;
// Between pieces that are loaded through staging so many bytes are copied along, rather than that a copy ends there:
// libllama's metadata between two tensors are 12.
constexpr uint64_t kBridge = 256;
// For one piece in staging: what lies before it on its first line in the host, and what aligns it.
constexpr uint64_t kPieceRoom = 2 * CudaPlanner::kHostLine;
static_assert(kBridge <= kPieceRoom && CudaPlanner::kHostLine <= CudaArena::kAlignment);
constexpr uint64_t kLeastSegment = 128 << 10;
static_assert(kLeastSegment >= kLongRun + kPieceRoom && 2 * kLeastSegment <= CudaArena::kLeast);

} // namespace

bool CudaPlanner::is_worth_waiting(const Leg &leg) const {
    return !leg.parts.is_closed() &&
           leg.parts.left() < std::min(kUrgentBytes, memory_.staging_bytes() / 2) &&
           way_of(leg, true) == CudaWay::Gather;
}

CudaPlanner::Lack CudaPlanner::lend(CudaSlot &slot, const Leg &leg, bool urgent,
                                    uint64_t most_bytes) {
    if (!leg.job->request.pinned && !(slot.bounce = memory_.take_bounce())) return Lack::Bounce;
    if (slot.way != CudaWay::Gather) return Lack::Nothing;
    // Urgent pieces share staging by two: one is copied while the kernel has the other. In the background a piece is
    // made ready behind those in the queue.
    const uint64_t all = memory_.staging_bytes();
    uint64_t wanted = urgent ? std::min(most_bytes, leg.parts.left()) : most_bytes;
    if (slot.bounce) wanted = std::min(wanted, slot.bounce->bytes()); // more slots instead
    wanted += kMostPieces * kPieceRoom;
    const uint64_t most =
        std::clamp(wanted, kLeastSegment, std::max(all / (urgent ? 2 : 4), kLeastSegment));
    const uint64_t least =
        urgent ? std::clamp(most, kLeastSegment, std::max(all / 4, kLeastSegment)) : most;
    slot.rows_in = CudaRowsIn::Table;
    Lack lack = Lack::Nothing;
    if (all == 0) {
        lack = Lack::Staging;
    } else if (!(slot.staging = memory_.take_staging(least, most))) {
        lack = Lack::Segment;
    } else if (is_regular(leg.parts)) {
        slot.rows_in = CudaRowsIn::Pieces;
    } else if (is_for_resident(leg) && !resident_ && !(resident_ = memory_.take_resident()) &&
               memory_.has_resident()) {
        lack = Lack::Resident;
    } else if (acquire_resident(leg)) {
        slot.rows_in = CudaRowsIn::Resident;
    } else if (!(slot.table = memory_.take_rows())) {
        lack = Lack::Table;
    }
    if (lack != Lack::Nothing) give_back(slot);
    return lack;
}

void CudaPlanner::give_back(CudaSlot &slot) {
    if (slot.staging && slot.rows_in == CudaRowsIn::Resident) {
        resident_->table().release();
        if (!resident_->table().in_use()) memory_.put_back(std::move(resident_));
    }
    memory_.put_back(std::exchange(slot.staging, {}));
    memory_.put_back(std::move(slot.table));
    memory_.put_back(std::move(slot.bounce));
}

void CudaPlanner::take(CudaSlot &slot, Leg &leg, bool urgent, uint64_t most) {
    Parts &parts = leg.parts;
    if (slot.bounce) most = std::min(most, slot.bounce->bytes());
    uint64_t rows_left = slot.way != CudaWay::Gather            ? 1
                         : slot.rows_in == CudaRowsIn::Resident ? CudaResidentTable::kRows
                                                                : CudaRowTable::kRows;
    slot.pieces.clear();
    slot.places.clear();
    slot.bytes = 0;
    uint64_t end = 0; // in staging
    do {
        uint64_t bytes = most - slot.bytes;
        if (slot.way == CudaWay::Gather) {
            const uint64_t room = slot.staging.bytes - end;
            bytes = std::min(bytes, room - std::min(room, kPieceRoom));
        }
        if (const kvf_region *block = parts.block()) {
            if (slot.way == CudaWay::Run) bytes = std::min(bytes, block->width);
            if (slot.way == CudaWay::Gather) {
                if (!slot.pieces.empty() && block->width > bytes) break;
                if (slot.rows_in == CudaRowsIn::Table)
                    bytes = std::min(bytes, block->width * rows_left);
            }
        } else if (!slot.pieces.empty() && bytes < std::min(kLongRun, parts.left())) {
            break; // the next run might not fit
        }
        const Piece &piece = slot.pieces.emplace_back(parts.next(bytes, rows_left));
        slot.bytes += piece.bytes;
        if (slot.way != CudaWay::Gather) continue;
        slot.places.push_back(place(slot, *leg.job, piece));
        end = slot.places.back() + piece.bytes;
        if (parts.empty()) break;
        if (slot.rows_in == CudaRowsIn::Pieces) {
            if (!is_regular(parts)) break;
        } else if (slot.rows_in == CudaRowsIn::Resident) {
            if (parts.block() || parts.span().table != *piece.table) break;
        } else {
            rows_left -= piece.runs ? piece.count : piece.block.rows;
        }
    } while (!parts.empty() && slot.bytes < most && rows_left > 0 &&
             slot.pieces.size() < kMostPieces && way_of(leg, urgent) == slot.way);
}

// Where the next piece belongs in staging: behind the one before it. What comes from the host at such a distance from it
// as it has there, if that is short; else so that a copy may begin with what lies before it on its line in the host.
uint64_t CudaPlanner::place(const CudaSlot &slot, const Job &job, const Piece &piece) const {
    const bool is_first = slot.places.empty();
    const Piece *last = is_first ? nullptr : &slot.pieces[slot.places.size() - 1];
    const uint64_t end = is_first ? 0 : slot.places.back() + last->bytes;
    if (direction_ == Direction::Save || !job.request.pinned) return end;
    if (last && last->is_packed()) {
        const uint64_t gap = piece.offset() - (last->offset() + last->bytes);
        if (gap <= kBridge) return end + gap;
    }
    return (end + kHostLine - 1) / kHostLine * kHostLine + kHostLine;
}

bool CudaPlanner::is_for_resident(const Leg &leg) {
    return !leg.parts.block() && leg.parts.runs_left() >= kLeastResident;
}

// Whether the next of the irregular rest can refer to the resident table. If so, that is acquired.
bool CudaPlanner::acquire_resident(const Leg &leg) {
    if (!is_for_resident(leg) || !resident_) return false;
    if (resident_->table().acquire(leg.parts.span().table)) return true;
    if (!resident_->table().in_use()) memory_.put_back(std::move(resident_));
    return false;
}

CudaWay CudaPlanner::way_of(const Leg &leg, bool urgent) const {
    const kvf_region *block = leg.parts.block();
    if (!block) return memory_.has_staging() ? CudaWay::Gather : CudaWay::Run;
    if (block->rows == 1 || block->width >= kUrgentBytes) return CudaWay::Run;
    const uint64_t pitch =
        std::max(block->pitch, leg.job->request.pinned ? block->buffer_pitch : 0);
    const bool is_direct = block->width >= kNarrow && pitch <= max_pitch_;
    if (is_direct && !(urgent && is_read_badly(*leg.job, *block))) return CudaWay::Block;
    if (memory_.has_staging() && block->width <= kLongRun) return CudaWay::Gather;
    return pitch <= max_pitch_ ? CudaWay::Block : CudaWay::Run;
}

// Rows that are loaded faster through staging.
bool CudaPlanner::is_read_badly(const Job &job, const kvf_region &block) const {
    if (direction_ == Direction::Save || !job.request.pinned || block.width >= kWide ||
        block.buffer_pitch != block.width || block.width * block.rows < kLeastRegular)
        return false;
    const uint64_t begin = reinterpret_cast<uint64_t>(job.request.buffer) + block.offset;
    return (begin | block.width) % kHostLine != 0;
}

// What comes next is a block that is worth a launch of its own.
bool CudaPlanner::is_regular(const Parts &parts) {
    const kvf_region *block = parts.block();
    return block && block->width * block->rows >= kLeastRegular;
}

} // namespace kvf
