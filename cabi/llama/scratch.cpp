#include "llama/scratch.h"

#include <sys/mman.h>
#include <sys/resource.h>

#include "core/status.h"

namespace kvf {
namespace {

bool address_space_is_limited() {
    rlimit limit{};
    return getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur != RLIM_INFINITY;
}

} // namespace

ScratchState::ScratchState(uint64_t bytes) : bytes_(bytes) {
    void *memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw Error(KVF_ERR_OUT_OF_MEMORY, "mapping a scratch state");
    data = static_cast<unsigned char *>(memory);
}

ScratchState::~ScratchState() {
    if (data) munmap(data, bytes_);
}

ScratchState ScratchCache::take(uint64_t bytes) {
    if (kept_ && kept_->bytes() >= bytes && uses_ < kMostUses) {
        ++uses_;
        ScratchState state(std::move(*kept_));
        kept_.reset();
        return state;
    }
    kept_.reset();
    uses_ = 1;
    return ScratchState(bytes);
}

void ScratchCache::keep(ScratchState &&state) noexcept {
    if (!address_space_is_limited()) kept_.emplace(std::move(state));
}

} // namespace kvf
