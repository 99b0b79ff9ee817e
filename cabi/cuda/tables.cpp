#include "cuda/tables.h"

#include <cstring>

namespace kvf {

CudaRowTable::CudaRowTable(const CudaContext &context, CUdeviceptr memory, uint32_t rows)
    : driver_(context.driver()),
      own_(memory ? CudaDeviceMemory() : CudaDeviceMemory(context, rows * sizeof(kvferry_row))),
      memory_(memory ? memory : own_.address()), pinned_(context, rows * sizeof(kvferry_row)),
      rows_(reinterpret_cast<kvferry_row *>(pinned_.data())) {}

void CudaRowTable::add(const Piece &piece, uint64_t place) {
    if (piece.runs) {
        for (uint64_t i = 0; i < piece.count; ++i) {
            add(piece.runs[i].address + piece.address_distance, place, piece.runs[i].bytes);
            place += piece.runs[i].bytes;
        }
    } else {
        const kvf_region &region = piece.region;
        for (uint64_t i = 0; i < region.rows; ++i) {
            add(region.address + i * region.pitch, place, region.width);
            place += region.width;
        }
    }
}

void CudaRowTable::add_bytes(const unsigned char *from, uint64_t bytes, uint64_t place) {
    std::memcpy(pinned_.data() + bytes_end_, from, bytes);
    add(memory_ + bytes_end_, place, bytes);
    bytes_end_ += bytes;
}

void CudaRowTable::add(const RunTable &table) {
    for (const Run &run : table.runs) {
        add(run.address, run.offset - table.runs[0].offset, run.bytes);
    }
}

bool CudaRowTable::add_as_in_buffer(const Piece &piece, uint64_t begin) {
    const uint32_t before = count_;
    for (uint64_t i = 0; i < piece.count; ++i) {
        const Run run = piece.run(i);
        const uint64_t distance = run.offset - begin; // modulo 2^64
        if (distance > UINT32_MAX) {
            count_ = before;
            return false;
        }
        add(run.address, distance, run.bytes);
    }
    return true;
}

void CudaRowTable::send(CUstream stream) const {
    const bool has_bytes = bytes_end_ > bytes_begin_;
    const uint64_t bytes = has_bytes ? bytes_end_ : count_ * sizeof(kvferry_row);
    driver_.check(driver_.cuMemcpyHtoDAsync(memory_, rows_, bytes, stream), "cuMemcpyHtoDAsync");
}

CudaResidentTable::CudaResidentTable(const CudaContext &context, CUdeviceptr memory)
    : context_(context), rows_(context, memory, kRows) {
    const CudaDriver &driver = context_.driver();
    const CudaCurrent current(context_);
    driver.check(driver.cuEventCreate(&sent_, CU_EVENT_DISABLE_TIMING), "cuEventCreate");
}

CudaResidentTable::~CudaResidentTable() {
    context_.clean_up([this](const CudaDriver &driver) { driver.cuEventDestroy(sent_); });
}

bool CudaResidentTable::acquire(const std::shared_ptr<const RunTable> &table) {
    if (table != table_) {
        if (in_use() || !table->packed || table->runs.size() > kRows) return false;
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
