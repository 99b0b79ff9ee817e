// A job may move while its submitting call still records the rest. A job that is committed
// completes once. A job that is retracted moves nothing any more when that returns, and nobody
// hears of it.
#include "inside.hpp"

namespace {

constexpr uint64_t kPart = 5 * MiB; // more than a piece
constexpr uint64_t kParts = 3;

// Memory of one device of the engine's, the host's or the GPU's, with a number in each byte.
class Source {
public:
    explicit Source(uint32_t device) : device_(device), content_(kParts * kPart) {
        for (uint64_t i = 0; i < content_.size(); ++i) content_[i] = static_cast<uint8_t>(i % 251);
        if (device_ != 0) memory_ = std::make_unique<DeviceMemory>(content_);
    }
    uint32_t device() const { return device_; }
    const Bytes &content() const { return content_; }
    kvf::Layout part(uint64_t index) const {
        const uint64_t address =
            device_ != 0 ? memory_->address() : reinterpret_cast<uint64_t>(content_.data());
        kvf::LayoutBuilder builder;
        builder.add(address + index * kPart, index * kPart, kPart);
        return builder.finish();
    }

private:
    const uint32_t device_;
    Bytes content_;
    std::unique_ptr<DeviceMemory> memory_;
};

struct Test {
    std::shared_ptr<kvf::Engine> engine;
    std::shared_ptr<kvf::Queue> queue = std::make_shared<kvf::Queue>();
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    Bytes buffer = Bytes(kParts * kPart, 0xAA);
    int ends = 0;
    int32_t end_status = 1;

    Test(std::shared_ptr<kvf::Engine> engine, uint32_t priority) : engine(std::move(engine)) {
        options.queue = kvf::new_handle(kvf::ObjectType::Queue);
        options.priority = priority;
        kvf::publish(options.queue, queue);
    }
    ~Test() {
        CHECK(queue->close()); // no place is reserved any more
        kvf::withdraw<kvf::Queue>(options.queue);
    }
    kvf::Submission submission() {
        kvf::Submission submission = make_submission(Way::Save, buffer.data(), buffer.size());
        submission.gate = engine->make_gate(options, 0);
        submission.on_end = [this](int32_t status) {
            ++ends;
            end_status = status;
        };
        return submission;
    }
    bool holds(const Source &source, uint64_t part) const {
        const auto *begin = buffer.data() + part * kPart;
        return std::equal(begin, begin + kPart, source.content().data() + part * kPart);
    }
    bool will_hold(const Source &source, uint64_t part) const {
        // The device writes it meanwhile: one byte at a time, until the last one is there.
        const volatile auto *last = buffer.data() + (part + 1) * kPart - 1;
        for (int i = 0; i < 10000; ++i) {
            if (*last == source.content()[(part + 1) * kPart - 1]) return true;
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
        return false;
    }
    int completions(kvf_completion *completion, int64_t timeout_ns) {
        return static_cast<int>(queue->take(completion, sizeof *completion, 1, timeout_ns));
    }
};

void committed(Test &&test, const Source &source) {
    kvf_job handle = 0;
    kvf_completion completion;
    {
        kvf::OpenJob open(*test.engine, test.submission(), test.options, true);
        CHECK(test.completions(&completion, 0) == 0);
        open.add(source.device(), source.part(0));
        CHECK(test.will_hold(source, 0));
        open.add(source.device(), source.part(1));
        CHECK(test.completions(&completion, 20'000'000) == 0); // it is not known to be all
        kvf::Recorded recorded = make_recorded(source.device(), source.part(2));
        recorded.bytes = 11;
        recorded.fragments = 12;
        recorded.segments = 13;
        recorded.listed_ns = 14;
        recorded.recorded_ns = 15;
        open.commit(std::move(recorded), &handle);
    }
    CHECK(test.completions(&completion, 60 * SECONDS) == 1);
    CHECK_OK(completion.status);
    CHECK(completion.job == handle && completion.bytes == 11 && completion.fragments == 12);
    CHECK(completion.segments == 13 && completion.listed_ns == 14 && completion.recorded_ns == 15);
    for (uint64_t part = 0; part < kParts; ++part) CHECK(test.holds(source, part));
    CHECK(test.ends == 1 && test.end_status == KVF_OK);
    CHECK(test.completions(&completion, 0) == 0);
    CHECK_OK(kvf_job_release(handle));
}

// Whatever was added last is all: nothing comes with the commit.
void committed_with_nothing_more(Test &&test, const Source &source) {
    kvf::OpenJob open(*test.engine, test.submission(), test.options, false);
    open.add(source.device(), source.part(0));
    CHECK(test.will_hold(source, 0));
    open.commit({}, nullptr);
    kvf_completion completion;
    CHECK(test.completions(&completion, 60 * SECONDS) == 1);
    CHECK_OK(completion.status);
}

void retracted(Test &&test, const Source &source) {
    uint64_t handle;
    {
        kvf::OpenJob open(*test.engine, test.submission(), test.options, true);
        handle = open.job()->handle;
        open.add(source.device(), source.part(0));
        open.add(source.device(), source.part(1));
    }
    // Nothing moves any more, and the buffer may be used.
    CHECK(test.ends == 1 && test.end_status == KVF_ERR_CANCELLED);
    std::fill(test.buffer.begin(), test.buffer.end(), 0xBB);
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    CHECK(std::count(test.buffer.begin(), test.buffer.end(), 0xBB) ==
          static_cast<std::ptrdiff_t>(test.buffer.size()));
    kvf_completion completion;
    CHECK(test.completions(&completion, 0) == 0);
    CHECK(kvf_job_poll(handle, nullptr, 0) == KVF_ERR_INVALID_HANDLE);
}

// By a thread that guessed its number: nobody has been given it yet.
void released_while_open(Test &&test, const Source &source) {
    {
        kvf::OpenJob open(*test.engine, test.submission(), test.options, true);
        open.add(source.device(), source.part(0));
        CHECK_OK(kvf_job_release(open.job()->handle));
    }
    CHECK(test.ends == 1 && test.end_status == KVF_ERR_CANCELLED);
    kvf_completion completion;
    CHECK(test.completions(&completion, 0) == 0);

    kvf_job handle = 0;
    {
        kvf::OpenJob open(*test.engine, test.submission(), test.options, true);
        open.add(source.device(), source.part(0));
        CHECK_OK(kvf_job_release(open.job()->handle));
        open.commit({}, &handle);
    }
    CHECK(test.completions(&completion, 60 * SECONDS) == 1);
    CHECK(completion.status == KVF_OK && completion.job == handle && test.ends == 2);
    CHECK_STATUS(KVF_ERR_INVALID_HANDLE, kvf_job_release(handle));
}

void cancelled_while_open(Test &&test, const Source &source) {
    kvf::OpenJob open(*test.engine, test.submission(), test.options, false);
    open.add(source.device(), source.part(0));
    test.engine->cancel([](const kvf::Job &) { return true; });
    open.add(source.device(), source.part(1));
    kvf_completion completion;
    CHECK(test.completions(&completion, 5'000'000) == 0 && test.ends == 0);
    open.commit(make_recorded(source.device(), source.part(2)), nullptr);
    CHECK(test.completions(&completion, 60 * SECONDS) == 1);
    CHECK(completion.status == KVF_ERR_CANCELLED && test.ends == 1);
}

// Asked to stop before it had a leg, and waiting for a stream that will take its time.
void cancelled_before_its_first_part(Test &&test, const Source &source) {
    const Stream stream;
    Barrier barrier;
    barrier.close(stream);
    test.options.flags = KVF_SUBMIT_FOLLOW_STREAM;
    test.options.stream = stream.number();
    kvf::OpenJob open(*test.engine, test.submission(), test.options, false);
    test.engine->cancel([](const kvf::Job &) { return true; });
    open.commit(make_recorded(source.device(), source.part(0)), nullptr);
    kvf_completion completion;
    CHECK(test.completions(&completion, 60 * SECONDS) == 1);
    CHECK(completion.status == KVF_ERR_CANCELLED && completion.started_ns == 0);
    barrier.open();
    stream.synchronize();
}

void others_pass_while_it_waits(Test &&test, const Source &source) {
    kvf::OpenJob open(*test.engine, test.submission(), test.options, false);
    open.add(source.device(), source.part(0));
    CHECK(test.will_hold(source, 0));
    Bytes other(kParts * kPart);
    succeed(kvf::submit_job(*test.engine, make_submission(Way::Save, other.data(), other.size()),
                            make_recorded(source.device(), source.part(1)), test.options, nullptr));
    kvf_completion completion;
    CHECK(test.completions(&completion, 60 * SECONDS) == 1);
    open.commit({}, nullptr);
    CHECK(test.completions(&completion, 60 * SECONDS) == 1);
}

// Many jobs of many parts from several threads, each committed, retracted or cancelled.
void races(const std::shared_ptr<kvf::Engine> &engine, const Source &source) {
    std::vector<std::thread> threads;
    for (unsigned thread = 0; thread < 3; ++thread) {
        threads.emplace_back([&, thread] {
            Random random(thread);
            Test test(engine, thread % 2 ? KVF_PRIORITY_URGENT : KVF_PRIORITY_BACKGROUND);
            for (int round = 0; round < 40; ++round) {
                const int before = test.ends;
                bool committed = false;
                {
                    kvf::OpenJob open(*engine, test.submission(), test.options, true);
                    for (uint64_t part = 0; part < kParts; ++part) {
                        if (random() % 4 != 0) open.add(source.device(), source.part(part));
                        if (random() % 6 == 0) open.job()->cancel();
                    }
                    committed = random() % 3 != 0;
                    if (committed) open.commit({}, nullptr);
                }
                kvf_completion completion;
                CHECK(test.completions(&completion, committed ? 60 * SECONDS : 0) == committed);
                CHECK(test.ends == before + 1);
                if (committed) CHECK_OK(kvf_job_release(completion.job));
            }
        });
    }
    for (auto &thread : threads) thread.join();
}

void device_lost_while_open() {
    Driver &d = driver();
    kvf_engine_options options = KVF_ENGINE_OPTIONS_INIT;
    auto engine = std::make_shared<kvf::Engine>(options);
    {
        const Source source(1);
        Test test(engine, KVF_PRIORITY_BACKGROUND);
        kvf::OpenJob open(*engine, test.submission(), test.options, false);
        open.add(1, source.part(0));
        CHECK(test.will_hold(source, 0));
        CHECK(d.lose_device(0, CUDA_ERROR_ILLEGAL_ADDRESS, 0) == 0);
        open.add(1, source.part(1));
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        open.add(1, source.part(2));
        open.commit({}, nullptr);
        kvf_completion completion;
        CHECK(test.completions(&completion, 60 * SECONDS) == 1);
        CHECK(completion.status == KVF_ERR_DEVICE_LOST && test.ends == 1);
    }
    engine->close();
}

} // namespace

int main() {
    const Context context;
    const Holdings holdings;
    {
        auto engine = make_cuda_engine(2);
        for (const uint32_t device : {0u, 1u}) {
            const Source source(device);
            for (const uint32_t priority : {KVF_PRIORITY_BACKGROUND, KVF_PRIORITY_URGENT}) {
                committed(Test(engine, priority), source);
                committed_with_nothing_more(Test(engine, priority), source);
                retracted(Test(engine, priority), source);
                released_while_open(Test(engine, priority), source);
                cancelled_while_open(Test(engine, priority), source);
                cancelled_before_its_first_part(Test(engine, priority), source);
                others_pass_while_it_waits(Test(engine, priority), source);
            }
            races(engine, source);
        }
        engine->close();
    }
    holdings.check_same();
    if (driver().simulated()) device_lost_while_open();
    return 0;
}
