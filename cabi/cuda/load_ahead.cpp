#include "cuda/load_ahead.h"

#include <algorithm>
#include <new>

namespace kvf {

// Nothing can fail once there is memory, which has to be released.
CudaLoadAhead::CudaLoadAhead(const CudaContext &context, const CudaKernels &kernels,
                             CudaAheadPool &pool, ThreadPool &copy_threads,
                             const std::vector<BufferPart> &parts)
    : context_(context), pool_(pool), copy_threads_(copy_threads), parts_(parts),
      placer_(context, kernels), memory_(pool.acquire(parts_.bytes())) {}

Layout CudaLoadAhead::staging_layout() const { return parts_.layout(memory_->address()); }

void CudaLoadAhead::staged_up_to(uint64_t bytes) noexcept {
    update([&] { staged_ = std::max(staged_, bytes); });
}

void CudaLoadAhead::staging_ended() noexcept {
    update([&] {
        staged_ = parts_.bytes();
        staging_ended_ = true;
    });
}

void CudaLoadAhead::place(std::shared_ptr<Job> job, Parts &&parts) noexcept {
    update([&] {
        job_ = std::move(job);
        placer_.begin(*memory_, std::move(parts));
    });
}

// Makes a change that the task has to look at, and starts a task if there is none and something can
// be placed.
template <class Function>
void CudaLoadAhead::update(Function &&change) noexcept {
    {
        std::lock_guard lock(mutex_);
        change();
        if (has_task_ || !job_) return;
        has_task_ = true;
    }
    try {
        copy_threads_.add([self = shared_from_this()] { self->run_task(); });
    } catch (const std::exception &) {
        run_task(); // there is no memory for a task
    }
}

void CudaLoadAhead::run_task() noexcept {
    for (uint64_t placed = 0;;) {
        uint64_t staged;
        bool ended;
        {
            std::lock_guard lock(mutex_);
            staged = staged_;
            ended = staging_ended_;
            if (staged <= placed && !ended) {
                has_task_ = false;
                return;
            }
        }
        place_up_to(staged);
        if (ended) return finish();
        placed = staged;
    }
}

void CudaLoadAhead::place_up_to(uint64_t offset) noexcept {
    if (job_->stopping()) {
        job_->cut_short();
        return;
    }
    try {
        const CudaCurrent current(context_);
        placer_.place_up_to(offset);
    } catch (const Error &error) {
        if (error.status == KVF_ERR_DEVICE_LOST) context_.note_lost();
        job_->fail(error.status, error.detail);
    } catch (const std::bad_alloc &) {
        job_->fail(KVF_ERR_OUT_OF_MEMORY, "");
    }
    if (job_->stopping()) job_->cut_short(); // the rest of it need not be staged
}

void CudaLoadAhead::finish() noexcept {
    std::shared_ptr<Job> job;
    {
        std::lock_guard lock(mutex_);
        job = std::move(job_);
    }
    release_memory();
    job->end_work();
}

void CudaLoadAhead::release_memory() noexcept {
    if (!memory_) return;
    placer_.end();
    pool_.release(std::move(memory_));
}

} // namespace kvf
