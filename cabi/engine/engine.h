// The engine: its devices, its pool of buffers, its threads, and the jobs in flight.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "cuda/stream_waits.h"
#include "engine/dispatcher.h"
#include "engine/jobs_in_flight.h"
#include "engine/locator.h"
#include "engine/trace.h"
#include "memory/pool.h"

namespace kvf {

class Engine final : public Object, public JobOwner {
public:
    static constexpr ObjectType kType = ObjectType::Engine;

    // Throws KVF_ERR_NO_DEVICE where devices are missing that `options` asks for.
    explicit Engine(const kvf_engine_options &options);
    ~Engine() override;

    // A JSON object for kvf_engine_describe().
    std::string describe() const;

    Device &device(uint32_t index) { return *devices_[index]; }
    size_t device_count() const { return devices_.size(); }
    Locator locator() const { return Locator(cuda_); }
    Pool &pool() { return *pool_; }
    // NULL where there is no device to pin memory for.
    const std::shared_ptr<Pinner> &pinner() const { return pinner_; }

    // Throws what a submission with these options would throw for them.
    void check(const kvf_submit_options &options) const;
    // The gate that the options ask for; NULL if they ask for none. `moved`: the devices whose
    // memory will be moved. Throws KVF_ERR_UNSUPPORTED without a CUDA device, and as
    // follow_stream() does.
    std::shared_ptr<Gate> make_gate(const kvf_submit_options &options, DeviceSet moved) const;

    // Makes the job one of those in flight; from then on the job must end. As of JobsInFlight.
    void enter(Job &job, const std::function<void()> &on_entry);
    // Cancels the jobs in flight that match.
    void cancel(const JobsInFlight::Matches &matches);
    void wait(const JobsInFlight::Matches &matches) { in_flight_.wait(matches); }
    void attach() { in_flight_.attach(); }
    void detach() noexcept { in_flight_.detach(); }

    // Returns all memory that is idle to the system: the pool's and the devices'.
    void trim();
    // Waits for everything and ends the threads. Throws KVF_ERR_BUSY, and then nothing has changed.
    void close();
    bool on_dispatch_thread() const { return dispatcher_.is_this_thread(); }
    uint32_t take_trace(void *events, uint64_t stride, uint32_t capacity) {
        return trace_.take(events, stride, capacity);
    }

    // For jobs and devices.
    void cut_short_stopping() override;
    void make_stream_wait(uint64_t stream, Job &job) override;
    void dispatch(Callbacks &&callbacks) override { dispatcher_.add(std::move(callbacks)); }
    void job_ended(Job &job) override { in_flight_.leave(job); }
    void trace(const Job &job, uint64_t begin_ns, uint64_t end_ns, uint64_t bytes,
               uint32_t device) override {
        trace_.add(job, begin_ns, end_ns, bytes, device);
    }

private:
    void open_cuda(const kvf_engine_options &options);
    void note_no_cuda(int ordinal, const std::string &why);

    Trace trace_;
    std::string no_cuda_; // why there is no CUDA device, or not each that was named
    CudaContexts cuda_;   // of the devices after the host
    std::shared_ptr<Pinner> pinner_;
    std::shared_ptr<Pool> pool_;
    std::unique_ptr<CudaStreamWaits> stream_waits_;
    JobsInFlight in_flight_;
    Dispatcher dispatcher_;
    std::vector<std::unique_ptr<Device>> devices_; // destroyed first: their threads use the rest
};

} // namespace kvf
