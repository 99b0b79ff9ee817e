// Pins host memory for the copy engines of all CUDA devices at once.
#pragma once

#include "cuda/context.h"
#include "memory/pinner.h"

namespace kvf {

class CudaPinner final : public Pinner {
public:
    explicit CudaPinner(CudaContexts contexts) : contexts_(std::move(contexts)) {}
    void pin(void *memory, uint64_t bytes) override;
    // Returns false once a context has been given up: the copy that did not end may use the range,
    // and the driver might wait for that copy forever.
    bool unpin(void *memory, uint64_t bytes) noexcept override;
    bool is_pinned(const void *memory, uint64_t bytes) const override;

private:
    const CudaContexts contexts_;
};

} // namespace kvf
