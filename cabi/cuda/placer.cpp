#include "cuda/placer.h"

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

namespace kvf {
namespace {

constexpr uint64_t kPiece = 16 << 20;
// Smaller regions, and shorter stretches of the irregular rest, are placed by one launch for many:
// blocks of a state have thousands of them, and each copy or launch of its own takes some
// microseconds.
constexpr uint64_t kLeastAlone = 4 << 20;
// All blocks of the kernel share so many rows, however long they are: FEW in gather.cu.
constexpr uint32_t kMostInBatch = 256;
constexpr uint32_t kBlocks = 128; // of a kernel's grid; on an H100 more were slower
constexpr std::chrono::microseconds kPoll{10};

// Where a piece ends in the buffer.
uint64_t end_in_buffer(const Piece &piece) {
    if (!piece.runs) {
        const kvf_region &region = piece.region;
        return region.offset + (region.rows - 1) * region.buffer_pitch + region.width;
    }
    uint64_t end = 0;
    for (uint64_t i = piece.is_packed() ? piece.count - 1 : 0; i < piece.count; ++i) {
        const Run run = piece.run(i);
        end = std::max(end, run.offset + run.bytes);
    }
    return end;
}

} // namespace

void CudaPlacer::begin(CudaAheadMemory &memory, Parts &&parts) noexcept {
    memory_ = &memory;
    parts_ = std::move(parts);
}

void CudaPlacer::end() noexcept {
    if (holds_resident_) memory_->resident().release();
    holds_resident_ = false;
}

void CudaPlacer::place_up_to(uint64_t offset) {
    try {
        while (take_next() && end_in_buffer(next_) <= offset) {
            copy(next_);
            next_ = {};
        }
        launch_batch();
    } catch (...) {
        try {
            if (!context_.given_up()) synchronize(); // what was queued must not outlive this call
        } catch (const Error &) {
            // Nothing is under way any more.
        }
        throw;
    }
    synchronize();
}

bool CudaPlacer::take_next() {
    if (next_.bytes == 0 && !parts_.empty()) next_ = parts_.next(kPiece, CudaRowTable::kRows);
    return next_.bytes > 0;
}

void CudaPlacer::copy(const Piece &piece) {
    const kvf_region &region = piece.region;
    if (piece.runs) {
        copy_runs(piece);
    } else if (piece.bytes >= kLeastAlone) {
        launch_batch();
        copy_alone(piece);
    } else if (piece.is_packed()) {
        add_to_batch(piece);
    } else {
        Piece row = piece;
        row.region.rows = 1;
        row.bytes = region.width;
        for (uint64_t i = 0; i < region.rows; ++i) {
            add_to_batch(row);
            row.region.address += region.pitch;
            row.region.offset += region.buffer_pitch;
        }
    }
}

void CudaPlacer::copy_alone(const Piece &piece) {
    const kvf_region &region = piece.region;
    if (region.rows > 1 && piece.is_packed()) {
        scatter(CudaRows::of(region, 0), region.offset);
    } else {
        for (uint64_t i = 0; i < region.rows; ++i) {
            copy_run(region.address + i * region.pitch, region.offset + i * region.buffer_pitch,
                     region.width);
        }
    }
}

void CudaPlacer::copy_runs(const Piece &piece) {
    if (piece.bytes >= kLeastAlone && scatter_resident(piece)) return;
    if (add_runs_to_batch(piece)) return;
    for (uint64_t i = 0; i < piece.count; ++i) {
        const Run run = piece.run(i);
        copy_run(run.address, run.offset, run.bytes);
    }
}

void CudaPlacer::begin_batch(const Piece &first) {
    launch_batch();
    synchronize(); // the batch before this one may use the table
    memory_->rows().clear();
    batch_.first = first;
}

bool CudaPlacer::fits_batch(const Piece &piece) const {
    if (batch_.pieces == 0) return false;
    const Piece &first = batch_.first;
    if (piece.runs || first.runs) {
        const bool has_room = batch_.runs + piece.count <= CudaRowTable::kRows;
        return piece.runs && first.runs && has_room;
    }
    if (batch_.pieces == kMostInBatch) return false;
    const kvf_region &region = piece.region;
    if (region.offset < first.region.offset ||
        region.offset - first.region.offset > UINT32_MAX - piece.bytes)
        return false;
    return region.rows > 1 ? CudaShape::of(region) == CudaShape::of(first.region)
                           : first.region.rows == 1;
}

void CudaPlacer::add_to_batch(const Piece &piece) {
    if (!fits_batch(piece)) begin_batch(piece);
    CudaRowTable &rows = memory_->rows();
    const uint64_t distance = piece.offset() - batch_.first.offset();
    if (piece.region.rows > 1) {
        rows.add_region(piece, distance);
    } else {
        rows.add(piece, distance);
    }
    ++batch_.pieces;
}

// Returns false for runs that are too far apart for a table.
bool CudaPlacer::add_runs_to_batch(const Piece &piece) {
    const auto add = [&] { return memory_->rows().add_as_in_buffer(piece, batch_.first.offset()); };
    if (!fits_batch(piece) || !add()) {
        begin_batch(piece);
        if (!add()) return false;
    }
    ++batch_.pieces;
    batch_.runs += piece.count;
    return true;
}

void CudaPlacer::launch_batch() {
    const Batch batch = std::exchange(batch_, {});
    if (batch.pieces == 0) return;
    const Piece &first = batch.first;
    if (batch.pieces == 1 && !first.runs) return copy_alone(first);
    const CudaRowTable &rows = memory_->rows();
    rows.send(memory_->stream());
    const bool has_regions = !first.runs && first.region.rows > 1;
    scatter(has_regions ? rows.rows_of_regions(CudaShape::of(first.region)) : rows.rows(),
            first.offset());
}

// Places the runs through the resident table. Returns false for a table of runs that cannot be
// resident.
bool CudaPlacer::scatter_resident(const Piece &piece) {
    CudaResidentTable &table = memory_->resident();
    bool acquired = table.acquire(*piece.table);
    if (!acquired && holds_resident_) {
        synchronize(); // what was launched with the table that is resident ends
        table.release();
        holds_resident_ = false;
        acquired = table.acquire(*piece.table);
    }
    if (!acquired) return false;
    if (holds_resident_) table.release(); // one of two
    holds_resident_ = true;
    table.send(memory_->stream());
    scatter(table.rows(piece, 0), piece.offset());
    return true;
}

void CudaPlacer::copy_run(CUdeviceptr to, uint64_t offset, uint64_t bytes) {
    driver_.check(
        driver_.cuMemcpyDtoDAsync(to, memory_->address() + offset, bytes, memory_->stream()),
        "cuMemcpyDtoDAsync");
}

void CudaPlacer::scatter(const CudaRows &rows, uint64_t offset) {
    kernels_.launch(Direction::Load, memory_->address() + offset, rows, kBlocks, memory_->stream());
}

void CudaPlacer::synchronize() {
    const uint64_t begin = now_ns();
    for (;;) {
        const CUresult result = driver_.cuStreamQuery(memory_->stream());
        if (result != CUDA_ERROR_NOT_READY) return driver_.check(result, "cuStreamQuery");
        if (now_ns() - begin > stuck_ns()) {
            context_.give_up();
            throw Error(KVF_ERR_DEVICE_LOST, "a copy did not end");
        }
        std::this_thread::sleep_for(kPoll);
    }
}

} // namespace kvf
