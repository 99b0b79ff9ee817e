#include "cuda/ahead_memory.h"

namespace kvf {

CudaAheadMemory::CudaAheadMemory(const CudaContext &context, uint64_t bytes)
    : context_(context), memory_(context, bytes + kTableBytes),
      resident_(context, memory_.address() + bytes),
      rows_(context, memory_.address() + bytes + CudaResidentTable::kBytes) {
    const CudaDriver &driver = context.driver();
    const CudaCurrent current(context);
    driver.check(driver.cuStreamCreateWithPriority(&stream_, CU_STREAM_NON_BLOCKING, 0),
                 "cuStreamCreateWithPriority");
}

CudaAheadMemory::~CudaAheadMemory() {
    context_.clean_up([this](const CudaDriver &driver) { driver.cuStreamDestroy(stream_); });
}

std::unique_ptr<CudaAheadMemory> CudaAheadPool::acquire(uint64_t bytes) {
    constexpr uint64_t kGrain = CudaDeviceMemory::kGrain;
    const uint64_t wanted = (bytes + kGrain - 1) / kGrain * kGrain;
    if (auto memory = take_free(wanted)) return memory;
    const bool any_is_useless = [this] {
        std::lock_guard lock(mutex_);
        return !free_.empty();
    }();
    auto memory = allocate(wanted);
    if (!memory) {
        trim();
        memory = allocate(wanted);
    }
    if (!memory) return nullptr;
    if (any_is_useless) copy_threads_.add([this] { trim(); });
    std::lock_guard lock(mutex_);
    free_.reserve(count_ + 1); // releasing cannot fail
    ++count_;
    return memory;
}

// Returns the smallest free memory that has room and is not far too large; NULL where there is
// none.
std::unique_ptr<CudaAheadMemory> CudaAheadPool::take_free(uint64_t bytes) {
    std::lock_guard lock(mutex_);
    auto best = free_.end();
    for (auto it = free_.begin(); it != free_.end(); ++it) {
        const uint64_t room = (*it)->bytes();
        if (room < bytes || room / 4 > bytes) continue;
        if (best == free_.end() || room < (*best)->bytes()) best = it;
    }
    if (best == free_.end()) return nullptr;
    auto memory = std::move(*best);
    free_.erase(best);
    return memory;
}

std::unique_ptr<CudaAheadMemory> CudaAheadPool::allocate(uint64_t bytes) const {
    try {
        return std::make_unique<CudaAheadMemory>(context_, bytes);
    } catch (const Error &error) {
        if (error.status != KVF_ERR_OUT_OF_MEMORY) throw;
        return nullptr;
    }
}

void CudaAheadPool::release(std::unique_ptr<CudaAheadMemory> memory) noexcept {
    std::lock_guard lock(mutex_);
    free_.push_back(std::move(memory)); // there is room
}

bool CudaAheadPool::empty() const {
    std::lock_guard lock(mutex_);
    return count_ == 0;
}

void CudaAheadPool::trim() noexcept {
    for (;;) {
        std::unique_ptr<CudaAheadMemory> memory; // is freed without the lock
        std::lock_guard lock(mutex_);
        if (free_.empty()) return;
        memory = std::move(free_.back());
        free_.pop_back();
        --count_;
    }
}

uint64_t CudaAheadPool::pinned_bytes() const {
    std::lock_guard lock(mutex_);
    return count_ * CudaAheadMemory::kTableBytes;
}

} // namespace kvf
