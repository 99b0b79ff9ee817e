// A stream that is being captured into a CUDA graph cannot be followed, nor made to wait for a job:
// what it is given runs when the graph is launched, perhaps never. The call is refused, and the
// capture goes on unharmed.
#include "cuda.hpp"

namespace {

// While it lives, what the stream is given is captured.
class Capture {
public:
    explicit Capture(CUstream stream) : stream_(stream) {
        const char *name = std::getenv("KVFERRY_CUDA_DRIVER");
        void *library = dlopen(name ? name : "libcuda.so.1", RTLD_NOW);
        CHECK(library);
        begin_ = reinterpret_cast<decltype(begin_)>(dlsym(library, "cuStreamBeginCapture_v2"));
        end_ = reinterpret_cast<decltype(end_)>(dlsym(library, "cuStreamEndCapture"));
        CHECK(begin_ && end_);
        CHECK_CUDA(begin_(stream, CU_STREAM_CAPTURE_MODE_GLOBAL));
    }
    // Fails where something has broken the capture.
    ~Capture() {
        CUgraph graph = nullptr;
        CHECK_CUDA(end_(stream_, &graph));
        CHECK(graph);
    }
    Capture(const Capture &) = delete;
    Capture &operator=(const Capture &) = delete;

private:
    const CUstream stream_;
    decltype(&cuStreamBeginCapture_v2) begin_;
    decltype(&cuStreamEndCapture) end_;
};

class Test {
public:
    explicit Test(kvf_engine engine)
        : engine_(engine), memory_(Bytes(kBytes, 1)), buffer_(engine, Kind::Pool, kBytes) {}

    // Both ways, host memory and a device's: nothing is submitted, and the text says why.
    void check_refused(uint64_t stream) {
        for (const uint64_t address : {memory_.address(), reinterpret_cast<uint64_t>(host_)}) {
            char error[256] = "";
            kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
            options.flags = KVF_SUBMIT_FOLLOW_STREAM;
            options.stream = stream;
            options.error = error;
            options.error_size = sizeof error;
            const kvf_region region = {address, kBytes, 1, 0, 0, 0};
            buffer_.fill(7);
            CHECK_STATUS(
                KVF_ERR_INVALID_ARGUMENT,
                kvf_regions_save(engine_, &region, 1, buffer_.data(), kBytes, &options, nullptr));
            CHECK(strstr(error, "captured"));
            CHECK_STATUS(
                KVF_ERR_INVALID_ARGUMENT,
                kvf_regions_load(engine_, &region, 1, buffer_.data(), kBytes, &options, nullptr));
            CHECK(buffer_.holds(Bytes(kBytes, 7)));
        }
    }
    kvf_job start_following(uint64_t stream) {
        kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
        options.flags = KVF_SUBMIT_FOLLOW_STREAM;
        options.stream = stream;
        return start(engine_, Way::Save, {{memory_.address(), kBytes, 1, 0, 0, 0}}, buffer_,
                     options);
    }
    bool buffer_is_saved() const { return buffer_.holds(Bytes(kBytes, 1)); }

private:
    static constexpr uint64_t kBytes = 100'000;
    static inline unsigned char host_[kBytes];
    const kvf_engine engine_;
    const DeviceMemory memory_;
    const Buffer buffer_;
};

} // namespace

int main() {
    const Context context;
    const Holdings holdings;
    {
        const Engine engine;
        Test test(engine);
        const Stream stream;
        CUstream blocking = nullptr;
        CHECK_CUDA(driver().cuStreamCreateWithPriority(&blocking, CU_STREAM_DEFAULT, 0));
        const kvf_job ended = test.start_following(stream.number());
        CHECK_OK(kvf_job_wait(ended, KVF_FOREVER, nullptr, 0));
        {
            const Capture capture(stream.get());
            test.check_refused(stream.number());
            CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_job_stream_wait(ended, stream.number()));
        }
        // A default stream would wait for a blocking stream, and so break the capture.
        {
            const Capture capture(blocking);
            test.check_refused(0);
            test.check_refused(reinterpret_cast<uint64_t>(CU_STREAM_LEGACY));
            CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, kvf_job_stream_wait(ended, 0));
            // Others can be followed meanwhile.
            succeed(test.start_following(stream.number()));
            CHECK(test.buffer_is_saved());
        }
        // Afterwards so can it.
        succeed(test.start_following(stream.number()));
        CHECK_OK(kvf_job_stream_wait(ended, stream.number()));
        CHECK_OK(kvf_job_release(ended));
        stream.synchronize();
        CHECK_CUDA(driver().cuStreamDestroy(blocking));
    }
    holdings.check_same();
    return 0;
}
