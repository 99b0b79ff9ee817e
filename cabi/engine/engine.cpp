#include "engine/engine.h"

#include <algorithm>
#include <bit>
#include <thread>

#include "core/json.h"
#include "cuda/pinner.h"
#include "host/device.h"

namespace kvf {
namespace {

// Between pinned and pageable memory one thread reaches a quarter of what the link moves. Six were
// best beside an H200 with 16 cores: more disturb one another.
uint32_t cuda_copy_threads(const kvf_engine_options &options) {
    if (options.copy_threads) return options.copy_threads;
    const uint32_t cores = std::max(std::thread::hardware_concurrency(), 1u);
    return std::clamp(cores / 2, std::min(cores, 4u), 6u);
}

std::string describe_pool(const Pool &pool, bool pinned) {
    const auto usage = pool.usage();
    return format("{\"limit\": %llu, \"mapped\": %llu, \"free\": %llu, \"lost\": %llu, "
                  "\"pinned\": %s}",
                  static_cast<unsigned long long>(usage.limit),
                  static_cast<unsigned long long>(usage.mapped),
                  static_cast<unsigned long long>(usage.free),
                  static_cast<unsigned long long>(usage.lost), pinned ? "true" : "false");
}

} // namespace

Engine::Engine(const kvf_engine_options &options) : trace_(options.flags & KVF_ENGINE_TRACE) {
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

Engine::~Engine() = default;

// Opens each CUDA device that is named, or every one there is, if it can be used. Why another
// cannot, and that the driver is missing, is noted; it is no error here.
void Engine::open_cuda(const kvf_engine_options &options) {
    const auto driver = CudaDriver::get(no_cuda_);
    if (!driver) return;
    int count = 0;
    const CUresult result = driver->cuDeviceGetCount(&count);
    if (result != CUDA_SUCCESS) no_cuda_ = kvf::describe(driver->error(result, "cuDeviceGetCount"));
    if (result == CUDA_SUCCESS && count == 0) no_cuda_ = "the CUDA driver shows no device";
    const auto pinned = std::make_shared<CudaPinnedBudget>(CudaDevice::kPinnedBudget);
    const uint64_t named = options.cuda_devices;
    for (int ordinal = count; ordinal < 64; ++ordinal) {
        if (named >> ordinal & 1) note_no_cuda(ordinal, format("the CUDA driver shows %d", count));
    }
    for (int ordinal = 0; ordinal < count; ++ordinal) {
        const bool is_named = ordinal < 64 && named >> ordinal & 1;
        if (named && !is_named) continue;
        try {
            auto context = std::make_shared<const CudaContext>(driver, ordinal);
            devices_.push_back(std::make_unique<CudaDevice>(
                *this, context, static_cast<uint32_t>(devices_.size()), options.staging_bytes,
                pinned, cuda_copy_threads(options)));
            cuda_.push_back(std::move(context));
        } catch (const Error &error) {
            note_no_cuda(ordinal, kvf::describe(error));
        }
    }
    if (cuda_.empty()) return;
    pinner_ = std::make_shared<CudaPinner>(cuda_);
    stream_waits_ = std::make_unique<CudaStreamWaits>(cuda_);
}

void Engine::note_no_cuda(int ordinal, const std::string &why) {
    no_cuda_ += format("%sdevice %d: ", no_cuda_.empty() ? "" : "; ", ordinal) + why;
}

std::string Engine::describe() const {
    std::string devices;
    for (const auto &device : devices_) {
        devices += (devices.empty() ? "" : ", ") + device->describe();
    }
    return format("{\"version\": \"%s\", \"abi\": %u, \"jobs_in_flight\": %zu, ", kvf_version(),
                  kvf_abi_version(), in_flight_.count()) +
           "\"pool\": " + describe_pool(*pool_, pinner_ != nullptr) +
           ", \"no_cuda\": " + json_quote(no_cuda_) + ", \"devices\": [" + devices + "]}";
}

void Engine::check(const kvf_submit_options &options) const {
    if (options.queue) find<Queue>(options.queue);
    in_flight_.check_open();
}

std::shared_ptr<Gate> Engine::make_gate(const kvf_submit_options &options, DeviceSet moved) const {
    if (!(options.flags & KVF_SUBMIT_FOLLOW_STREAM)) return nullptr;
    if (cuda_.empty()) throw Error(KVF_ERR_UNSUPPORTED, "the engine has no CUDA device");
    return follow_stream(cuda_, options.stream, moved);
}

void Engine::enter(Job &job, const std::function<void()> &on_entry) {
    in_flight_.enter(job, [&] {
        // Under the lock: close() ends the thread, and looks for it once.
        if (job.has_callback()) dispatcher_.start();
        if (on_entry) on_entry();
    });
}

void Engine::cancel(const JobsInFlight::Matches &matches) {
    in_flight_.mark_cancelled(matches);
    cut_short_stopping();
}

void Engine::cut_short_stopping() {
    for (auto &device : devices_) device->cut_short_stopping();
}

void Engine::make_stream_wait(uint64_t stream, Job &job) {
    if (!stream_waits_) throw Error(KVF_ERR_UNSUPPORTED, "the engine has no CUDA device");
    stream_waits_->make_wait(stream, job);
}

void Engine::trim() {
    pool_->trim(UINT64_MAX);
    for (auto &device : devices_) device->trim();
}

void Engine::close() {
    if (on_dispatch_thread()) throw Error(KVF_ERR_BUSY, "called from a completion callback");
    in_flight_.close();
    for (auto &device : devices_) device->stop();
    dispatcher_.stop();
    pool_->trim(UINT64_MAX);
}

} // namespace kvf
