// The CUDA driver, opened at run time: libkvferry serves machines with and without a GPU.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "core/status.h"
#include "cuda/driver_api.h"
#include "memory/pinner.h"

namespace kvf {

class CudaDriver {
public:
    // Opens the driver that the environment variable KVFERRY_CUDA_DRIVER names, or libcuda.so.1, once
    // for the process. NULL where there is none that can be used; `why` then says so.
    static std::shared_ptr<const CudaDriver> get(std::string &why);

#define KVF_CUDA_MEMBER(name, symbol, parameters) CUresult(*name) parameters = nullptr;
    CUDA_DRIVER_ENTRY_POINTS(KVF_CUDA_MEMBER)
#undef KVF_CUDA_MEMBER

    int version = 0; // of the CUDA that the driver supports: 1000 * major + 10 * minor

    // Throws KVF_ERR_OUT_OF_MEMORY, KVF_ERR_DEVICE_LOST for an error that no later call recovers from,
    // or KVF_ERR_DEVICE.
    void check(CUresult result, const char *call) const;
    Error error(CUresult result, const char *call) const;
};

// A device's primary context, which is the one that llama.cpp, PyTorch and every program of the CUDA
// runtime use. Retained while this object lives.
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

    // Makes this context the calling thread's for as long as the thread lives, and lets it work while
    // another thread captures a CUDA graph.
    void adopt_thread() const;

    // Something in it never ends, and what frees, unpins or releases would wait for that: from now on
    // nobody makes it current any more, and what it holds stays behind.
    void give_up() const { given_up_.store(true, std::memory_order_relaxed); }
    bool given_up() const { return given_up_.load(std::memory_order_relaxed); }

    // It had an error that no later call recovers from.
    void note_lost() const { lost_.store(true, std::memory_order_relaxed); }
    bool lost() const { return lost_.load(std::memory_order_relaxed); }

private:
    const std::shared_ptr<const CudaDriver> driver_;
    const int ordinal_;
    CUdevice device_ = 0;
    CUcontext context_ = nullptr;
    mutable std::atomic<bool> given_up_{false}, lost_{false};
};

// What has not ended by then never will; the device is given up.
uint64_t stuck_ns();

using CudaContexts = std::vector<std::shared_ptr<const CudaContext>>;

// One of them to ask what is the same for all: the first that works, or else the first that was not given up.
// Throws KVF_ERR_DEVICE_LOST where there is none.
const CudaContext &usable(const CudaContexts &contexts);

// Lets the calling thread work while another thread captures a CUDA graph, until the end of this object.
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

// Makes a context current on a thread that is not ours, and puts everything back at the end.
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

// Pins host memory for all devices at once.
class CudaPinner final : public Pinner {
public:
    explicit CudaPinner(CudaContexts contexts) : contexts_(std::move(contexts)) {}
    void pin(void *memory, uint64_t bytes) override;
    // False once a context has been given up: a copy of its that did not end may name the range, and the driver might
    // wait for that for ever.
    bool unpin(void *memory, uint64_t bytes) noexcept override;
    bool is_pinned(const void *memory, uint64_t bytes) const override;

private:
    const CudaContexts contexts_;
};

} // namespace kvf
