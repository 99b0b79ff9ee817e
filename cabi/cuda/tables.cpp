#include "cuda/tables.h"

namespace kvf {

CudaRowTable::CudaRowTable(const CudaContext &context, CUdeviceptr place, uint32_t rows)
    : context_(context), place_(place) {
    const CudaDriver &driver = context.driver();
    const CudaCurrent current(context);
    void *memory;
    driver.check(
        driver.cuMemHostAlloc(&memory, rows * sizeof(kvferry_row), CU_MEMHOSTALLOC_PORTABLE),
        "cuMemHostAlloc");
    rows_ = static_cast<kvferry_row *>(memory);
}

CudaRowTable::~CudaRowTable() {
    try {
        const CudaCurrent current(context_);
        context_.driver().cuMemFreeHost(rows_);
    } catch (const Error &) {
        // The context is gone, and the memory with it.
    }
}

void CudaRowTable::add(const Piece &piece, uint64_t place) {
    const auto add_row = [&](uint64_t address, uint64_t bytes) {
        rows_[count_++] = {address, static_cast<uint32_t>(place), static_cast<uint32_t>(bytes)};
        place += bytes;
    };
    if (piece.runs) {
        for (uint64_t i = 0; i < piece.count; ++i) {
            add_row(piece.runs[i].address + piece.address_distance, piece.runs[i].bytes);
        }
    } else {
        const kvf_region &block = piece.block;
        for (uint64_t i = 0; i < block.rows; ++i) {
            add_row(block.address + i * block.pitch, block.width);
        }
    }
}

void CudaRowTable::add(const RunTable &table) {
    for (const Run &run : table.runs) {
        rows_[count_++] = {run.address, static_cast<uint32_t>(run.offset - table.runs[0].offset),
                           static_cast<uint32_t>(run.bytes)};
    }
}

bool CudaRowTable::add_as_in_buffer(const Piece &piece) {
    for (uint64_t i = 0; i < piece.count; ++i) {
        const Run &run = piece.runs[i];
        const uint64_t distance = run.offset - piece.runs[0].offset;
        if (distance > UINT32_MAX) return false;
        rows_[count_++] = {run.address + piece.address_distance, static_cast<uint32_t>(distance),
                           static_cast<uint32_t>(run.bytes)};
    }
    return true;
}

void CudaRowTable::send(CUstream stream) const {
    const CudaDriver &driver = context_.driver();
    driver.check(driver.cuMemcpyHtoDAsync(place_, rows_, count_ * sizeof(kvferry_row), stream),
                 "cuMemcpyHtoDAsync");
}

CudaResidentTable::CudaResidentTable(const CudaContext &context, CUdeviceptr place)
    : context_(context), rows_(context, place, kRows) {
    const CudaDriver &driver = context.driver();
    const CudaCurrent current(context);
    driver.check(driver.cuEventCreate(&sent_, CU_EVENT_DISABLE_TIMING), "cuEventCreate");
}

CudaResidentTable::~CudaResidentTable() {
    try {
        const CudaCurrent current(context_);
        context_.driver().cuEventDestroy(sent_);
    } catch (const Error &) {
        // The context is gone, and the event with it.
    }
}

bool CudaResidentTable::acquire(const std::shared_ptr<const RunTable> &table) {
    if (table != table_) {
        if (users_ > 0 || !table->packed || table->runs.size() > kRows) return false;
        table_ = table;
        is_sent_ = false;
    }
    ++users_;
    return true;
}

void CudaResidentTable::send(CUstream stream) {
    const CudaDriver &driver = context_.driver();
    if (is_sent_) {
        return driver.check(driver.cuStreamWaitEvent(stream, sent_, 0), "cuStreamWaitEvent");
    }
    rows_.clear();
    rows_.add(*table_);
    rows_.send(stream);
    driver.check(driver.cuEventRecord(sent_, stream), "cuEventRecord");
    is_sent_ = true;
}

CudaRows CudaResidentTable::rows(const Piece &piece, uint64_t place) const {
    const Run *const table = table_->runs.data();
    CudaRows rows = rows_.rows();
    rows.table += static_cast<uint64_t>(piece.runs - table) * sizeof(kvferry_row);
    rows.count = static_cast<uint32_t>(piece.count);
    rows.address_distance = piece.address_distance;
    rows.offset_distance = static_cast<uint32_t>(place - (piece.runs->offset - table->offset));
    return rows;
}

} // namespace kvf
