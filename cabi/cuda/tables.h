// Tables of rows for the gather and scatter kernels: written in pinned memory, read by the kernels from device
// memory. (Read through the link, they would keep a kernel waiting on its multiprocessors while the link is full of
// our own copies.)
#pragma once

#include <memory>

#include "cuda/kernels.h"

namespace kvf {

// A table that is written anew for each launch.
class CudaRowTable {
public:
    static constexpr uint32_t kRows = 32768;
    static constexpr uint64_t kBytes = kRows * sizeof(kvferry_row);

    // `place` is device memory for as many rows, which stays the caller's.
    CudaRowTable(const CudaContext &context, CUdeviceptr place, uint32_t rows = kRows);
    ~CudaRowTable();
    CudaRowTable(const CudaRowTable &) = delete;
    CudaRowTable &operator=(const CudaRowTable &) = delete;

    // The rows of a piece that begins at that place in staging, where they follow one another; or of a whole table of
    // runs, each at its distance from the first in the buffer. What was launched with the table before must have ended.
    void clear() { count_ = 0; }
    void add(const Piece &piece, uint64_t place);
    void add(const RunTable &table);

    // The runs of a piece, each at its distance from the first in the buffer. False if they are too far apart for that.
    bool add_as_in_buffer(const Piece &piece);

    // Queues the copy of the table to the device.
    void send(CUstream stream) const;
    // What was sent; to be launched on the same stream.
    CudaRows rows() const {
        CudaRows rows;
        rows.table = place_;
        rows.count = count_;
        return rows;
    }

private:
    const CudaContext &context_;
    const CUdeviceptr place_;
    kvferry_row *rows_ = nullptr;
    uint32_t count_ = 0;
};

// A table of runs that stays on the device while pieces refer to it: the tensors of a cache share one, so that it
// travels once and not once a piece. While nobody uses it, it may be changed for another.
class CudaResidentTable {
public:
    static constexpr uint32_t kRows = 65536;
    static constexpr uint64_t kBytes = kRows * sizeof(kvferry_row);

    // `place` is device memory of kBytes, which stays the caller's.
    CudaResidentTable(const CudaContext &context, CUdeviceptr place);
    ~CudaResidentTable();
    CudaResidentTable(const CudaResidentTable &) = delete;
    CudaResidentTable &operator=(const CudaResidentTable &) = delete;

    // False if it has another table, which is in use, or if this one does not fit. A true is followed by one release(),
    // when what was launched with the table has ended.
    bool acquire(const std::shared_ptr<const RunTable> &table);
    void release() { --users_; }
    bool in_use() const { return users_ > 0; }

    // What the stream is given from now on finds the table that was acquired.
    void send(CUstream stream);
    // The rows of a piece of it that begins at that place in staging.
    CudaRows rows(const Piece &piece, uint64_t place) const;

private:
    const CudaContext &context_;
    CudaRowTable rows_;
    CUevent sent_ = nullptr;
    std::shared_ptr<const RunTable> table_;
    bool is_sent_ = false;
    uint32_t users_ = 0;
};

} // namespace kvf
