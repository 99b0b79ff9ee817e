// The engine: devices, the pool of buffers, the dispatch thread, and the jobs in flight.
#pragma once

#include <deque>
#include <thread>
#include <unordered_set>

#include "cuda/allocation.h"
#include "cuda/device.h"
#include "cuda/stream_waits.h"
#include "engine/submission.h"

namespace kvf {

class Engine;

// Where a range of memory lies.
struct Place {
    uint32_t device; // its index
    // What one copy may span: ranges that follow one another in a list, and of which this differs, must not be
    // joined. Of the host's memory it is always the same.
    uint64_t allocation;
};

// Finds where an address lies. Made for one submission: it remembers where it last looked, so that half a
// million regions of a few tensors cost a few questions.
class Locator {
public:
    explicit Locator(const Engine &engine) : engine_(engine) {}
    // Throws KVF_ERR_UNREACHABLE.
    Place operator()(uint64_t address, uint64_t bytes);

private:
    bool on_cuda(uint64_t address, uint32_t &device);
    uint64_t allocation_of(uint64_t address, uint64_t bytes);

    const Engine &engine_;
    MappedCheck mapped_;
    CudaAllocation known_{}; // of the device below
    uint32_t known_device_ = 0;
    uint64_t neighbours_begin_ = 0, neighbours_end_ = 0; // ranges without a gap between them
};

class Engine final : public Object, public JobOwner, public std::enable_shared_from_this<Engine> {
public:
    static constexpr ObjectType kType = ObjectType::Engine;
    static constexpr uint32_t kHost = 0; // index of the host among the devices

    explicit Engine(const kvf_engine_options &options);
    ~Engine() override;

    std::string describe() const;

    Device &device(uint32_t index) { return *devices_[index]; }
    size_t device_count() const { return devices_.size(); }

    // Throws what submit() would for these options.
    void check(const kvf_submit_options &options) const;
    // Behind what the options say that a submission of memory of these devices follows; NULL for nothing.
    std::shared_ptr<Gate> make_gate(const kvf_submit_options &options, DeviceSet moved) const;
    void cancel(Job &job) override;
    void stop(Job &job) override;
    void stop_all() override;
    using Concern = std::function<bool(const Job &)>;
    void cancel(const Concern &concerns);
    void wait(const Concern &concerns);

    void make_stream_wait(uint64_t stream, Job &job) override;

    Pool &pool() { return *pool_; }
    // Gives back to the system all memory that is idle: the pool's and the devices'.
    void trim();
    std::shared_ptr<Pinner> pinner() const { return pinner_; }

    // An attachment holds the engine: it cannot be destroyed meanwhile.
    void hold();
    void let_go();
    // Waits for everything and ends the threads. Throws KVF_ERR_BUSY, and then nothing has changed.
    void close();
    // The caller is a completion callback: it must not wait for what needs callbacks to go on.
    bool on_dispatch_thread() const;

    void expect_callbacks();
    void dispatch(Callbacks &&callbacks) override;
    void job_ended(Job &job) override;
    void trace(const Job &job, uint64_t begin_ns, uint64_t end_ns, uint64_t bytes,
               uint32_t device) override;
    uint32_t take_trace(void *events, uint64_t stride, uint32_t capacity);

private:
    friend class Locator;
    friend class OpenJob;

    std::shared_ptr<Job> make_job(Submission &submission, const kvf_submit_options &options);
    void enter(const std::shared_ptr<Job> &job, kvf_queue queue,
               const std::function<void()> &on_entry);

    void open_cuda(const kvf_engine_options &options);
    void run_dispatch();

    const bool tracing_;
    std::string no_cuda_; // why there is none
    CudaContexts cuda_;   // of the devices after the host
    std::shared_ptr<Pinner> pinner_;
    std::shared_ptr<Pool> pool_;
    std::unique_ptr<CudaStreamWaits> stream_waits_;
    std::vector<std::unique_ptr<Device>> devices_;

    mutable std::mutex mutex_;
    std::condition_variable changed_;
    std::unordered_set<Job *> in_flight_;
    uint32_t held_ = 0;
    bool closing_ = false;

    // Callbacks. The thread is started when first needed.
    std::mutex dispatch_mutex_;
    std::condition_variable dispatch_work_;
    Callbacks callbacks_;
    bool dispatch_stopping_ = false;
    std::thread dispatch_thread_;

    std::mutex trace_mutex_;
    std::deque<kvf_trace_event> trace_;
};

} // namespace kvf
