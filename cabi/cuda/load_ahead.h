// A load ahead on a CUDA device.
#pragma once

#include <memory>
#include <mutex>

#include "core/thread_pool.h"
#include "cuda/placer.h"
#include "jobs/job.h"

namespace kvf {

// Two threads report in any order: the pump tells how much has been staged, and the submitting call
// tells where the bytes belong. A task on the copy threads copies to their places all bytes of
// which both are known. So when the last piece has been staged, all other pieces are in their
// places.
class CudaLoadAhead final : public LoadAhead, public std::enable_shared_from_this<CudaLoadAhead> {
public:
    // For parts of a buffer. Must not outlive the pool.
    CudaLoadAhead(const CudaContext &context, const CudaKernels &kernels, CudaAheadPool &pool,
                  ThreadPool &copy_threads, const std::vector<BufferPart> &parts);
    ~CudaLoadAhead() override { release_memory(); }
    // Whether the device had room for the state. If not, no other function may be called.
    bool has_memory() const { return memory_ != nullptr; }

    Layout staging_layout() const override;
    uint64_t bytes_before(uint64_t offset) const override { return parts_.place_of(offset); }
    void staged_up_to(uint64_t bytes) noexcept override;
    void staging_ended() noexcept override;
    void place(std::shared_ptr<Job> job, Parts &&parts) noexcept override;

private:
    template <class Function>
    void update(Function &&change) noexcept;
    void run_task() noexcept;
    void place_up_to(uint64_t offset) noexcept;
    void finish() noexcept;
    void release_memory() noexcept;

    const CudaContext &context_;
    CudaAheadPool &pool_;
    ThreadPool &copy_threads_;
    const StagedParts parts_;

    std::mutex mutex_;
    uint64_t staged_ = 0; // bytes of the device memory that have been filled, from its beginning
    bool staging_ended_ = false;
    bool has_task_ = false;    // a task runs, which will look at the two members above again
    std::shared_ptr<Job> job_; // from place() until the task has finished

    CudaPlacer placer_; // the task's own, after place()
    std::unique_ptr<CudaAheadMemory> memory_;
};

} // namespace kvf
