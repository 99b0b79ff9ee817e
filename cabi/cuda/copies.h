// Queues copies, tables of rows and kernels on a slot's stream. If a call of the driver fails, a
// function throws its error; it may have queued a part of its work by then.
#pragma once

#include "cuda/planner.h"

namespace kvf {

class CudaCopies {
public:
    // `kernels` may be NULL if no slot is staged.
    CudaCopies(const CudaContext &context, const CudaKernels *kernels, Direction direction,
               uint64_t max_pitch, const CudaPlanner &planner)
        : driver_(context.driver()), kernels_(kernels), direction_(direction),
          max_pitch_(max_pitch), planner_(planner) {}

    // For a slot that is staged: send_table() sends the table that launch() needs; launch() moves
    // the rows between the cache and staging.
    void send_table(const CudaSlot &slot) const;
    void launch(const CudaSlot &slot, uint32_t blocks) const;
    // Copies the pieces between the device and the host. On the host they are in the job's buffer,
    // or in the bounce buffer if the slot has one.
    void copy(const CudaSlot &slot) const;

private:
    void copy_direct(const CudaSlot &slot) const;
    void copy_staged(const CudaSlot &slot) const;
    void copy_run(const CudaSlot &slot, CUdeviceptr address, unsigned char *host,
                  uint64_t bytes) const;
    void copy_rows(const CudaSlot &slot, CUdeviceptr address, uint64_t pitch, unsigned char *host,
                   uint64_t host_pitch, uint64_t width, uint64_t rows) const;

    const CudaDriver &driver_;
    const CudaKernels *const kernels_;
    const Direction direction_;
    const uint64_t max_pitch_;
    const CudaPlanner &planner_;
};

} // namespace kvf
