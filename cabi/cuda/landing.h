// Loads ahead on a CUDA device.
#pragma once

#include <mutex>
#include <vector>

#include "core/thread_pool.h"
#include "cuda/tables.h"
#include "jobs/job.h"

namespace kvf {

// Device memory for states that are on their way. What a landing has had is kept for the next one until trim().
class CudaLandings {
public:
    // `kernels` must not be NULL. The crew moves what has arrived.
    CudaLandings(const CudaContext &context, const CudaKernels &kernels, ThreadPool &crew);
    ~CudaLandings();
    CudaLandings(const CudaLandings &) = delete;
    CudaLandings &operator=(const CudaLandings &) = delete;

    // For a state of `bytes`. NULL where there is no memory for it. What does not land must not outlive this.
    std::shared_ptr<Landing> make(uint64_t bytes);

    // There is none, in use or kept. Any thread.
    bool empty() const;
    // Gives back to the system what is kept. Any thread.
    void trim() noexcept;
    uint64_t pinned_bytes() const;

private:
    class One;
    class Field;

    std::unique_ptr<Field> allocate(uint64_t bytes) const;

    const CudaContext &context_;
    const CudaKernels &kernels_;
    ThreadPool &crew_;
    mutable std::mutex mutex_;
    std::vector<std::unique_ptr<Field>> idle_;
    size_t made_ = 0; // idle or not
};

} // namespace kvf
