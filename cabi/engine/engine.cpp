#include "engine/engine.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <new>

#include "core/json.h"
#include "core/thread.h"
#include "cuda/pinner.h"
#include "host/device.h"

namespace kvf {
namespace {

constexpr size_t kTraceEvents = 65536;

thread_local const Engine *dispatching = nullptr; // whose dispatch thread this is

} // namespace

Engine::Engine(const kvf_engine_options &options) : tracing_(options.flags & KVF_ENGINE_TRACE) {
    devices_.push_back(std::make_unique<HostDevice>(*this, options.copy_threads));
    if (options.devices == KVF_DEVICES_HOST) {
        no_cuda_ = "not asked for";
    } else {
        open_cuda(options);
        const bool must_have_any = options.devices == KVF_DEVICES_CUDA;
        const auto named = static_cast<size_t>(std::popcount(options.cuda_devices));
        if ((cuda_.empty() && must_have_any) || cuda_.size() < named) {
            throw Error(KVF_ERR_NO_DEVICE, no_cuda_);
        }
    }
    pool_ = std::make_shared<Pool>(options.pinned_limit, pinner_);
}

// Every CUDA device that is named, or every one there is, if it can be used. Others, and a missing driver, are noted and
// not an error here.
void Engine::open_cuda(const kvf_engine_options &options) {
    const auto driver = CudaDriver::get(no_cuda_);
    if (!driver) return;
    int count = 0;
    const CUresult result = driver->cuDeviceGetCount(&count);
    if (result != CUDA_SUCCESS) no_cuda_ = kvf::describe(driver->error(result, "cuDeviceGetCount"));
    if (result == CUDA_SUCCESS && count == 0) no_cuda_ = "the CUDA driver shows no device";
    // Between pinned and pageable memory one thread reaches a quarter of what the link moves. Six were
    // best beside an H200 with 16 cores: more disturb one another.
    const uint32_t cores = std::max(std::thread::hardware_concurrency(), 1u);
    const uint32_t copy_threads = options.copy_threads
                                      ? options.copy_threads
                                      : std::clamp(cores / 2, std::min(cores, 4u), 6u);
    const auto note = [this](int ordinal, const std::string &why) {
        no_cuda_ += format("%sdevice %d: ", no_cuda_.empty() ? "" : "; ", ordinal) + why;
    };
    const auto pinned = std::make_shared<CudaPinnedBudget>(CudaDevice::kPinnedBudget);
    const uint64_t named = options.cuda_devices;
    for (int ordinal = count; ordinal < 64; ++ordinal) {
        if (named >> ordinal & 1) note(ordinal, format("the CUDA driver shows %d", count));
    }
    for (int ordinal = 0; ordinal < count; ++ordinal) {
        const bool is_named = ordinal < 64 && named >> ordinal & 1;
        if (named && !is_named) continue;
        try {
            auto context = std::make_shared<const CudaContext>(driver, ordinal);
            devices_.push_back(
                std::make_unique<CudaDevice>(*this, context, static_cast<uint32_t>(devices_.size()),
                                             options.staging_bytes, pinned, copy_threads));
            cuda_.push_back(std::move(context));
        } catch (const Error &error) {
            note(ordinal, kvf::describe(error));
        }
    }
    if (cuda_.empty()) return;
    pinner_ = std::make_shared<CudaPinner>(cuda_);
    stream_waits_ = std::make_unique<CudaStreamWaits>(cuda_);
}

Engine::~Engine() = default;

std::string Engine::describe() const {
    std::string devices;
    for (const auto &device : devices_) {
        devices += (devices.empty() ? "" : ", ") + device->describe();
    }
    const auto usage = pool_->usage();
    size_t in_flight;
    {
        std::lock_guard lock(mutex_);
        in_flight = in_flight_.size();
    }
    return format("{\"version\": \"%s\", \"abi\": %u, \"jobs_in_flight\": %zu, ", kvf_version(),
                  kvf_abi_version(), in_flight) +
           format("\"pool\": {\"limit\": %llu, \"mapped\": %llu, \"free\": %llu, \"lost\": %llu, "
                  "\"pinned\": %s}, ",
                  static_cast<unsigned long long>(usage.limit),
                  static_cast<unsigned long long>(usage.mapped),
                  static_cast<unsigned long long>(usage.free),
                  static_cast<unsigned long long>(usage.lost), pinner_ ? "true" : "false") +
           "\"no_cuda\": " + json_quote(no_cuda_) + ", \"devices\": [" + devices + "]}";
}

bool Locator::on_cuda(uint64_t address, uint32_t &device) {
    if (address >= known_.begin && address < known_.end) {
        device = known_device_;
        return true;
    }
    const auto allocation = find_allocation(usable(engine_.cuda_), address);
    if (!allocation) return false;
    for (size_t i = 0; i < engine_.cuda_.size(); ++i) {
        if (engine_.cuda_[i]->ordinal() != allocation->ordinal) continue;
        known_ = *allocation;
        device = known_device_ = static_cast<uint32_t>(i + 1); // after the host
        return true;
    }
    throw Error(KVF_ERR_UNREACHABLE,
                format("CUDA device %d is not among the engine's", allocation->ordinal));
}

// A driver refuses a copy from one allocation into another, and what it makes of one across addresses that nothing is
// mapped to is not documented. Called when on_cuda() has found the last byte.
uint64_t Locator::allocation_of(uint64_t address, uint64_t bytes) {
    if (address < known_.begin) return address; // in several, or the driver does not tell: alone
    if (known_.in_one_piece) return known_.begin;
    // Between neighbours there is no hole: they may be one run, but not rows with something between them.
    if (address != neighbours_end_ || address == known_.begin) neighbours_begin_ = address;
    neighbours_end_ = address + bytes;
    return neighbours_begin_;
}

Place Locator::operator()(uint64_t address, uint64_t bytes) {
    uint32_t first = Engine::kHost, last = Engine::kHost;
    if (!engine_.cuda_.empty() && on_cuda(address, first)) {
        // A range that is mapped from several allocations begins and ends in different ones.
        if (on_cuda(address + bytes - 1, last) && last == first) {
            return {first, allocation_of(address, bytes)};
        }
        throw Error(KVF_ERR_UNREACHABLE,
                    format("the range at 0x%llx reaches beyond the device's memory",
                           static_cast<unsigned long long>(address)));
    }
    if (mapped_(address, bytes)) return {Engine::kHost, 0};
    throw Error(KVF_ERR_UNREACHABLE, format("address 0x%llx cannot be read by this process",
                                            static_cast<unsigned long long>(address)));
}

void Engine::check(const kvf_submit_options &options) const {
    if (options.queue) find<Queue>(options.queue);
    std::lock_guard lock(mutex_);
    if (closing_) throw Error(KVF_ERR_CLOSED);
}

std::shared_ptr<Gate> Engine::make_gate(const kvf_submit_options &options, DeviceSet moved) const {
    if (!(options.flags & KVF_SUBMIT_FOLLOW_STREAM)) return nullptr;
    if (cuda_.empty()) throw Error(KVF_ERR_UNSUPPORTED, "the engine has no CUDA device");
    return follow_stream(cuda_, options.stream, moved);
}

std::shared_ptr<Job> Engine::make_job(Submission &submission, const kvf_submit_options &options) {
    auto job = std::make_shared<Job>();
    job->direction = submission.direction;
    job->priority = options.priority;
    job->mode = submission.mode;
    job->buffer = submission.buffer;
    job->user_data = options.user_data;
    job->submitted_ns = submission.submitted_ns;
    if (options.callback) job->callback.push_back({options.callback, {}});
    job->owned_by = submission.owned_by;
    job->on_end = std::move(submission.on_end);
    job->gate = std::move(submission.gate);
    job->keep = std::move(submission.keep);
    job->owner = this;
    job->weak_owner = weak_from_this();
    if (submission.buffer_bytes) {
        job->memory = use_memory(submission.buffer, submission.buffer_bytes);
    }
    job->pinned = job->memory && job->memory->pinned();
    if (!job->pinned && pinner_ && submission.buffer_bytes) {
        job->pinned = pinner_->is_pinned(submission.buffer, submission.buffer_bytes);
    }
    // A thread of ours would crash in it.
    if (job->direction == Direction::Save && !job->memory && !job->pinned &&
        !WritableCheck()(reinterpret_cast<uint64_t>(submission.buffer), submission.buffer_bytes)) {
        throw Error(KVF_ERR_INVALID_ARGUMENT, "the buffer cannot be written");
    }
    return job;
}

// Makes the job one of those in flight; from then on it ends in the ordinary way. Throws, and then it is none.
void Engine::enter(const std::shared_ptr<Job> &job, kvf_queue queue_handle,
                   const std::function<void()> &on_entry) {
    std::shared_ptr<Queue> queue;
    if (queue_handle) queue = find<Queue>(queue_handle);
    std::lock_guard lock(mutex_);
    if (closing_) throw Error(KVF_ERR_CLOSED);
    if (!job->callback.empty())
        expect_callbacks(); // close() ends the thread, and looks for it once
    const auto entry = in_flight_.insert(job.get()).first;
    try {
        if (queue) queue->reserve();
        try {
            if (on_entry) on_entry();
        } catch (...) {
            if (queue) queue->give_up_reserved();
            throw;
        }
    } catch (...) {
        in_flight_.erase(entry);
        throw;
    }
    job->queue = std::move(queue);
}

void Engine::cancel(Job &job) {
    job.cancel();
    stop(job);
}

// A leg that comes to its device later is found to be stopping there.
void Engine::stop(Job &job) {
    for (size_t i = 0; Leg *leg = job.leg(i); ++i) device(leg->device).cut_short(*leg);
}

void Engine::stop_all() {
    for (auto &device : devices_) device->sweep();
}

void Engine::cancel(const Concern &concerns) {
    {
        std::lock_guard lock(mutex_);
        for (Job *job : in_flight_) {
            if (concerns(*job)) job->cancel();
        }
    }
    stop_all();
}

void Engine::wait(const Concern &concerns) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] {
        return std::none_of(in_flight_.begin(), in_flight_.end(),
                            [&](const Job *job) { return concerns(*job); });
    });
}

void Engine::make_stream_wait(uint64_t stream, Job &job) {
    if (!stream_waits_) throw Error(KVF_ERR_UNSUPPORTED, "the engine has no CUDA device");
    stream_waits_->make_wait(stream, job);
}

void Engine::trim() {
    pool_->trim(UINT64_MAX);
    for (auto &device : devices_) device->trim();
}

void Engine::hold() {
    std::lock_guard lock(mutex_);
    if (closing_) throw Error(KVF_ERR_CLOSED);
    ++held_;
}

void Engine::let_go() {
    std::lock_guard lock(mutex_);
    --held_;
}

void Engine::close() {
    if (on_dispatch_thread()) throw Error(KVF_ERR_BUSY, "called from a completion callback");
    {
        std::unique_lock lock(mutex_);
        if (closing_) throw Error(KVF_ERR_INVALID_HANDLE, "the engine is being destroyed");
        if (held_) throw Error(KVF_ERR_BUSY, format("%u kvf_llama are attached", held_));
        closing_ = true;
        changed_.wait(lock, [this] { return in_flight_.empty(); });
    }
    for (auto &device : devices_) device->stop();
    {
        std::lock_guard lock(dispatch_mutex_);
        dispatch_stopping_ = true;
        dispatch_work_.notify_all();
    }
    if (dispatch_thread_.joinable()) dispatch_thread_.join();
    pool_->trim(UINT64_MAX);
}

bool Engine::on_dispatch_thread() const { return dispatching == this; }

void Engine::job_ended(Job &job) {
    std::lock_guard lock(mutex_);
    in_flight_.erase(&job);
    changed_.notify_all();
}

void Engine::expect_callbacks() {
    std::lock_guard lock(dispatch_mutex_);
    if (!dispatch_thread_.joinable()) dispatch_thread_ = start_thread([this] { run_dispatch(); });
}

void Engine::dispatch(Callbacks &&callbacks) {
    std::lock_guard lock(dispatch_mutex_);
    callbacks_.splice(callbacks_.end(), callbacks);
    dispatch_work_.notify_one();
}

void Engine::run_dispatch() {
    dispatching = this;
    name_thread("kvf-dispatch");
    std::unique_lock lock(dispatch_mutex_);
    for (;;) {
        dispatch_work_.wait(lock, [this] { return dispatch_stopping_ || !callbacks_.empty(); });
        if (callbacks_.empty()) return;
        Callbacks next;
        next.splice(next.end(), callbacks_, callbacks_.begin());
        lock.unlock();
        next.front().function(&next.front().completion);
        lock.lock();
    }
}

void Engine::trace(const Job &job, uint64_t begin_ns, uint64_t end_ns, uint64_t bytes,
                   uint32_t device) {
    if (!tracing_) return;
    std::lock_guard lock(trace_mutex_);
    if (trace_.size() == kTraceEvents) trace_.pop_front();
    try {
        trace_.push_back({job.handle, job.user_data, begin_ns, end_ns, bytes, device,
                          static_cast<uint32_t>(job.direction)});
    } catch (const std::bad_alloc &) {
        // A transfer does not fail for want of its trace.
    }
}

uint32_t Engine::take_trace(void *events, uint64_t stride, uint32_t capacity) {
    if (!tracing_)
        throw Error(KVF_ERR_UNSUPPORTED, "the engine was created without KVF_ENGINE_TRACE");
    std::lock_guard lock(trace_mutex_);
    auto *out = static_cast<unsigned char *>(events);
    uint32_t n = 0;
    for (; n < capacity && !trace_.empty(); ++n, out += stride) {
        copy_struct(trace_.front(), out, stride);
        trace_.pop_front();
    }
    return n;
}

} // namespace kvf
