// Copies a state from the device memory that it was staged in to its places in the cache, within
// the device.
#pragma once

#include "cuda/ahead_memory.h"

namespace kvf {

// For one thread at a time.
class CudaPlacer {
public:
    CudaPlacer(const CudaContext &context, const CudaKernels &kernels)
        : context_(context), driver_(context.driver()), kernels_(kernels) {}

    // Begins with a state whose bytes are in `memory` and belong where `parts` say. The memory must
    // live until end().
    void begin(CudaAheadMemory &memory, Parts &&parts) noexcept;
    // Copies all pieces whose bytes lie before `offset` in the buffer, and waits for the copies.
    void place_up_to(uint64_t offset);
    // Copies no more, and no longer uses the memory. Does nothing if nothing has begun.
    void end() noexcept;

private:
    // Small pieces that one launch places through the table of rows. Each is one row of any width,
    // or all are packed rows of one shape, or all are of the irregular rest.
    struct Batch {
        uint32_t pieces = 0;
        uint64_t runs = 0; // of the irregular rest
        Piece first;
    };

    bool take_next();
    void copy(const Piece &piece);
    void copy_alone(const Piece &piece);
    void copy_runs(const Piece &piece);
    void begin_batch(const Piece &first);
    bool fits_batch(const Piece &piece) const;
    void add_to_batch(const Piece &piece);
    bool add_runs_to_batch(const Piece &piece);
    void launch_batch();
    bool scatter_resident(const Piece &piece);
    void copy_run(CUdeviceptr to, uint64_t offset, uint64_t bytes);
    void scatter(const CudaRows &rows, uint64_t offset);
    void synchronize();

    const CudaContext &context_;
    const CudaDriver &driver_;
    const CudaKernels &kernels_;
    CudaAheadMemory *memory_ = nullptr;
    Parts parts_;
    Piece next_; // taken from the parts and not copied yet; bytes == 0: none
    Batch batch_;
    bool holds_resident_ = false;
};

} // namespace kvf
