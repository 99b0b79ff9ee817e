#include "cuda/copies.h"

#include <algorithm>
#include <utility>

namespace kvf {
namespace {

// Bytes that have one distance between staging and the buffer, which one copy moves, across pieces
// too.
struct Stretch {
    uint64_t place = 0;  // in staging
    uint64_t offset = 0; // in the buffer
    uint64_t bytes = 0;

    // Adds bytes that have the same distance. Returns false for others.
    bool extend(uint64_t next_place, uint64_t next_offset, uint64_t next_bytes) {
        if (bytes == 0 || next_place - place != next_offset - offset) return false;
        bytes = next_place + next_bytes - place;
        return true;
    }
};

// Calls `take(place, offset, bytes)` for each run of a piece: where it lies in staging, if the
// piece lies at `place`, and in the buffer. A packed piece is one run.
template <class Take>
void for_each_run(const Piece &piece, uint64_t place, Take &&take) {
    if (piece.is_packed()) return take(place, piece.offset(), piece.bytes);
    if (piece.runs) {
        for (uint64_t i = 0; i < piece.count; ++i) {
            const Run run = piece.run(i);
            take(place, run.offset, run.bytes);
            place += run.bytes;
        }
        return;
    }
    const kvf_region &region = piece.region;
    for (uint64_t i = 0; i < region.rows; ++i) {
        take(place, region.offset + i * region.buffer_pitch, region.width);
        place += region.width;
    }
}

} // namespace

void CudaCopies::send_table(const CudaSlot &slot) const {
    if (slot.rows_in == CudaRowsIn::Resident) return planner_.resident().send(slot.stream);
    if (slot.rows_in == CudaRowsIn::Pieces) return;
    // The copy of a save writes the gaps that it moves: staging must hold what the host has there.
    const auto gap_before = [&](size_t i) -> uint64_t {
        if (i == 0 || direction_ == Direction::Load) return 0;
        return slot.places[i] - (slot.places[i - 1] + slot.pieces[i - 1].bytes);
    };
    uint64_t rows = 0;
    for (size_t i = 0; i < slot.pieces.size(); ++i) {
        const Piece &piece = slot.pieces[i];
        rows += (slot.is_shaped(piece) ? 1 : piece.rows()) + (gap_before(i) > 0);
    }
    CudaRowTable &table = *slot.table;
    table.clear(rows);
    for (size_t i = 0; i < slot.pieces.size(); ++i) {
        const Piece &piece = slot.pieces[i];
        const uint64_t place = slot.places[i], gap = gap_before(i);
        const unsigned char *host = slot.leg->job->request.buffer + piece.offset();
        if (gap > 0) table.add_bytes(host - gap, gap, place - gap);
        if (!slot.is_shaped(piece)) table.add(piece, place);
    }
    for (size_t i = 0; i < slot.pieces.size(); ++i) {
        if (slot.is_shaped(slot.pieces[i])) table.add_region(slot.pieces[i], slot.places[i]);
    }
    table.send(slot.stream);
}

void CudaCopies::launch(const CudaSlot &slot, uint32_t blocks) const {
    const auto launch = [&](const CudaRows &rows) {
        if (rows.count == 0) return;
        kernels_->launch(direction_, slot.staging.address, rows, blocks, slot.stream);
    };
    if (slot.rows_in == CudaRowsIn::Table) {
        launch(slot.table->rows());
        launch(slot.table->rows_of_regions(slot.shape));
        return;
    }
    for (size_t i = 0; i < slot.pieces.size(); ++i) {
        const Piece &piece = slot.pieces[i];
        launch(slot.rows_in == CudaRowsIn::Resident
                   ? planner_.resident().rows(piece, slot.places[i])
                   : CudaRows::of(piece.region, slot.places[i]));
    }
}

void CudaCopies::copy(const CudaSlot &slot) const {
    slot.way == CudaWay::Staged ? copy_staged(slot) : copy_direct(slot);
}

// Between the cache and the host.
void CudaCopies::copy_direct(const CudaSlot &slot) const {
    const Job &job = *slot.leg->job;
    unsigned char *packed = slot.bounce ? slot.bounce->data() : nullptr;
    for (const Piece &piece : slot.pieces) {
        const kvf_region &region = piece.region;
        if (piece.runs) {
            const Run run = piece.run(0);
            copy_run(slot, run.address,
                     job.request.pinned ? job.request.buffer + run.offset : packed, run.bytes);
        } else if (job.request.pinned) {
            copy_rows(slot, region.address, region.pitch, job.request.buffer + region.offset,
                      region.buffer_pitch, region.width, region.rows);
        } else {
            copy_rows(slot, region.address, region.pitch, packed, region.width, region.width,
                      region.rows);
        }
        packed += piece.bytes;
    }
}

// Between staging and the host.
void CudaCopies::copy_staged(const CudaSlot &slot) const {
    const Job &job = *slot.leg->job;
    const CUdeviceptr staging = slot.staging.address;
    if (!job.request.pinned) return copy_run(slot, staging, slot.bounce->data(), slot.bytes);
    Stretch stretch;
    const auto flush = [&] {
        if (stretch.bytes == 0) return;
        copy_run(slot, staging + stretch.place, job.request.buffer + stretch.offset, stretch.bytes);
        stretch.bytes = 0;
    };
    const auto add = [&](uint64_t place, uint64_t offset, uint64_t bytes, bool may_have_room) {
        if (stretch.extend(place, offset, bytes)) return;
        flush();
        // Pieces that are loaded have room in staging for what precedes them on their line in the
        // host, if that is in their buffer.
        const auto begin = reinterpret_cast<uint64_t>(job.request.buffer) + offset;
        const bool has_room = may_have_room && direction_ == Direction::Load;
        const uint64_t before = has_room ? std::min(begin % CudaPlanner::kHostLine, offset) : 0;
        stretch = {place - before, offset - before, bytes + before};
    };
    for (size_t i = 0; i < slot.pieces.size(); ++i) {
        const Piece &piece = slot.pieces[i];
        const kvf_region &region = piece.region;
        if (piece.gap == Piece::Gap::Nothing) flush(); // another buffer may begin
        if (!piece.is_packed() && !piece.runs && region.buffer_pitch <= max_pitch_) {
            flush();
            copy_rows(slot, staging + slot.places[i], region.width,
                      job.request.buffer + region.offset, region.buffer_pitch, region.width,
                      region.rows);
            continue;
        }
        bool may_have_room = piece.gap == Piece::Gap::Read; // before the piece's first run
        for_each_run(piece, slot.places[i], [&](uint64_t place, uint64_t offset, uint64_t bytes) {
            add(place, offset, bytes, std::exchange(may_have_room, false));
        });
    }
    flush();
}

void CudaCopies::copy_run(const CudaSlot &slot, CUdeviceptr address, unsigned char *host,
                          uint64_t bytes) const {
    if (direction_ == Direction::Save) {
        driver_.check(driver_.cuMemcpyDtoHAsync(host, address, bytes, slot.stream),
                      "cuMemcpyDtoHAsync");
    } else {
        driver_.check(driver_.cuMemcpyHtoDAsync(address, host, bytes, slot.stream),
                      "cuMemcpyHtoDAsync");
    }
}

void CudaCopies::copy_rows(const CudaSlot &slot, CUdeviceptr address, uint64_t pitch,
                           unsigned char *host, uint64_t host_pitch, uint64_t width,
                           uint64_t rows) const {
    if (rows == 1) return copy_run(slot, address, host, width);
    CUDA_MEMCPY2D copy{};
    copy.WidthInBytes = width;
    copy.Height = rows;
    if (direction_ == Direction::Save) {
        copy.srcMemoryType = CU_MEMORYTYPE_DEVICE;
        copy.srcDevice = address;
        copy.srcPitch = pitch;
        copy.dstMemoryType = CU_MEMORYTYPE_HOST;
        copy.dstHost = host;
        copy.dstPitch = host_pitch;
    } else {
        copy.srcMemoryType = CU_MEMORYTYPE_HOST;
        copy.srcHost = host;
        copy.srcPitch = host_pitch;
        copy.dstMemoryType = CU_MEMORYTYPE_DEVICE;
        copy.dstDevice = address;
        copy.dstPitch = pitch;
    }
    driver_.check(driver_.cuMemcpy2DAsync(&copy, slot.stream), "cuMemcpy2DAsync");
}

} // namespace kvf
