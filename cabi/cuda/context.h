// A CUDA device's context, and what makes it current on a thread.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "cuda/driver.h"

namespace kvf {

// A device's primary context, which llama.cpp, PyTorch and every program of the CUDA runtime use
// too. Retained while this object lives.
class CudaContext {
public:
    CudaContext(std::shared_ptr<const CudaDriver> driver, int ordinal);
    ~CudaContext();
    CudaContext(const CudaContext &) = delete;
    CudaContext &operator=(const CudaContext &) = delete;

    const CudaDriver &driver() const { return *driver_; }
    CUcontext handle() const { return context_; }
    int ordinal() const { return ordinal_; }
    int attribute(CUdevice_attribute attribute) const;
    std::string name() const;
    std::string pci_bus_id() const;
    uint64_t total_memory() const;

    // Makes the context current on the calling thread for the rest of the thread's life, and lets
    // the thread work while another one captures a CUDA graph.
    void adopt_thread() const;

    // Some work in the context never ends, and every call that frees, unpins or releases would wait
    // for it. From now on nobody makes the context current, and nothing in it is freed.
    void give_up() const { given_up_.store(true, std::memory_order_relaxed); }
    bool given_up() const { return given_up_.load(std::memory_order_relaxed); }

    // The context had an error that no later call recovers from.
    void note_lost() const { lost_.store(true, std::memory_order_relaxed); }
    bool lost() const { return lost_.load(std::memory_order_relaxed); }

    // Calls `free(driver)` with the context current, to free something of the context. Does nothing
    // if the context was given up or cannot be made current: the driver frees what is in a context
    // together with the context.
    template <class Function>
    void clean_up(Function &&free) const noexcept;

private:
    const std::shared_ptr<const CudaDriver> driver_;
    const int ordinal_;
    CUdevice device_ = 0;
    CUcontext context_ = nullptr;
    mutable std::atomic<bool> given_up_{false}, lost_{false};
};

using CudaContexts = std::vector<std::shared_ptr<const CudaContext>>;

// Returns one of the contexts, for calls that do the same in all of them: the first that works, or
// else the first that was not given up. Throws KVF_ERR_DEVICE_LOST if all were given up.
const CudaContext &usable(const CudaContexts &contexts);

// As CudaContext::clean_up(), for something that all contexts share: in one that is usable.
template <class Function>
void clean_up(const CudaContexts &contexts, Function &&free) noexcept;

// Returns after how many nanoseconds work that has not ended is taken never to end, so that its
// device is given up: a minute, or KVFERRY_STUCK_SECONDS of the environment.
uint64_t stuck_ns();

// While it lives, the calling thread may work although another thread captures a CUDA graph.
class CudaRelaxed {
public:
    explicit CudaRelaxed(const CudaDriver &driver);
    ~CudaRelaxed();
    CudaRelaxed(const CudaRelaxed &) = delete;
    CudaRelaxed &operator=(const CudaRelaxed &) = delete;

private:
    const CudaDriver &driver_;
    CUstreamCaptureMode mode_ = CU_STREAM_CAPTURE_MODE_RELAXED; // afterwards the thread's own
    const bool exchanged_;
};

// While it lives, the context is current on the calling thread, and the thread may work although
// another one captures a CUDA graph. Afterwards the thread is as it was.
class CudaCurrent {
public:
    // Throws KVF_ERR_DEVICE_LOST for a context that was given up.
    explicit CudaCurrent(const CudaContext &context);
    ~CudaCurrent();
    CudaCurrent(const CudaCurrent &) = delete;
    CudaCurrent &operator=(const CudaCurrent &) = delete;

private:
    const CudaDriver &driver_;
    const CudaRelaxed relaxed_;
};

template <class Function>
void CudaContext::clean_up(Function &&free) const noexcept {
    try {
        const CudaCurrent current(*this);
        free(driver());
    } catch (const Error &) {
        // There is nothing left to free.
    }
}

template <class Function>
void clean_up(const CudaContexts &contexts, Function &&free) noexcept {
    try {
        usable(contexts).clean_up(free);
    } catch (const Error &) {
        // As above.
    }
}

} // namespace kvf
