// Tables of rows for the gather and scatter kernels. The host writes a table in pinned memory, and
// the kernels read a copy of it in device memory. (Kernels that read the pinned table would wait
// for the link, which is full of the library's own copies, and would occupy their multiprocessors.)
#pragma once

#include <memory>

#include "cuda/kernels.h"
#include "cuda/memory.h"

namespace kvf {

// A table that is written anew for each launch.
class CudaRowTable {
public:
    // 16 MiB in rows of 512 bytes, and the gaps between 64 pieces.
    static constexpr uint32_t kRows = 32768 + 2048;
    static constexpr uint64_t kBytes = kRows * sizeof(kvferry_row); // in either memory

    // `memory` is the caller's device memory for `rows` rows, and outlives the table. 0: the table
    // allocates its own.
    explicit CudaRowTable(const CudaContext &context, CUdeviceptr memory = 0,
                          uint32_t rows = kRows);
    CudaRowTable(const CudaRowTable &) = delete;
    CudaRowTable &operator=(const CudaRowTable &) = delete;

    // Empties the table. Kernels that were launched with it must have ended. Bytes of add_bytes()
    // come behind so many rows.
    void clear(uint64_t rows_before_bytes = 0) {
        count_ = regions_ = 0;
        bytes_begin_ = bytes_end_ = rows_before_bytes * sizeof(kvferry_row);
    }
    // Adds the rows of a piece that lies in staging at `place`, one row after another.
    void add(const Piece &piece, uint64_t place);
    // Adds bytes of the host's, which travel with the table, as a row for staging at `place`.
    void add_bytes(const unsigned char *from, uint64_t bytes, uint64_t place);
    // Adds regions of one shape by their first rows, behind all other rows.
    void add_region(const Piece &piece, uint64_t place) {
        add(piece.region.address, place, piece.region.width);
        ++regions_;
    }
    // Adds all runs of a table, each at its distance from the first one in the buffer.
    void add(const RunTable &table);
    // Adds the runs of a piece, each at its distance from the place `begin` of the buffer. Returns
    // false, and adds none, if one of them lies before it or too far behind it for a table.
    bool add_as_in_buffer(const Piece &piece, uint64_t begin);

    // Queues the copy of the table to the device.
    void send(CUstream stream) const;
    // Each returns rows that were sent, for a launch on the same stream: those that stand in the
    // table, and those of the regions.
    CudaRows rows() const {
        CudaRows rows;
        rows.table = memory_;
        rows.count = count_ - regions_;
        return rows;
    }
    CudaRows rows_of_regions(const CudaShape &shape) const {
        CudaRows rows;
        rows.table = memory_ + (count_ - regions_) * sizeof(kvferry_row);
        rows.count = static_cast<uint32_t>(regions_ * shape.rows);
        rows.rows_each = static_cast<uint32_t>(shape.rows);
        rows.pitch = shape.pitch;
        return rows;
    }

    uint64_t pinned_bytes() const { return pinned_.bytes(); }

private:
    void add(uint64_t address, uint64_t offset, uint64_t bytes) {
        rows_[count_++] = {address, static_cast<uint32_t>(offset), static_cast<uint32_t>(bytes)};
    }

    const CudaDriver &driver_;
    const CudaDeviceMemory own_;
    const CUdeviceptr memory_;
    const CudaPinnedMemory pinned_;
    kvferry_row *const rows_; // in pinned_
    uint32_t count_ = 0;      // of the table's rows
    uint32_t regions_ = 0;    // of these: the last ones, each the first row of a region
    uint64_t bytes_begin_ = 0, bytes_end_ = 0; // in pinned_: of the bytes behind the rows
};

// A table of runs that stays on the device while pieces refer to it. The tensors of a cache share
// one table, which is copied once, not once for each piece. While nobody uses the table, another
// can take its place.
class CudaResidentTable {
public:
    static constexpr uint32_t kRows = 65536;
    static constexpr uint64_t kBytes = kRows * sizeof(kvferry_row); // in either memory

    // `memory` is kBytes of the caller's device memory, and outlives the table. 0: the table
    // allocates its own.
    explicit CudaResidentTable(const CudaContext &context, CUdeviceptr memory = 0);
    ~CudaResidentTable();
    CudaResidentTable(const CudaResidentTable &) = delete;
    CudaResidentTable &operator=(const CudaResidentTable &) = delete;

    // Adds a user of the table of runs. Returns false if another table is resident and in use, or
    // if this one does not fit. The caller calls release() once for each true, when the kernels
    // that were launched with the table have ended.
    bool acquire(const std::shared_ptr<const RunTable> &table);
    void release() { --users_; }
    bool in_use() const { return users_ > 0; }

    // All that is queued on the stream from now on finds the acquired table on the device: queues
    // the table's copy, or a wait for it.
    void send(CUstream stream);
    // Returns the rows of a piece of the acquired table. The piece lies in staging at `place`.
    CudaRows rows(const Piece &piece, uint64_t place) const;

    uint64_t pinned_bytes() const { return rows_.pinned_bytes(); }

private:
    const CudaContext &context_;
    CudaRowTable rows_;
    CUevent sent_ = nullptr;
    std::shared_ptr<const RunTable> table_;
    bool is_sent_ = false;
    uint32_t users_ = 0;
};

} // namespace kvf
