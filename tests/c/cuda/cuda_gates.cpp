// Streams that jobs follow are asked without a lock of the device's: who submits or cancels does
// not wait for a driver's answer, however many jobs follow streams.
#include <atomic>
#include <condition_variable>
#include <mutex>

#include "inside.hpp"

namespace {

// As a stream's: done when the test says so.
class TestGate final : public kvf::Gate {
public:
    void open() { done_.store(true); }
    uint64_t asked() const { return asked_; }

    // From now on whoever asks waits until the test goes on: a driver that takes its time.
    void stall() {
        std::lock_guard lock(mutex_);
        stalled_ = true;
    }
    void wait_until_somebody_waits() {
        std::unique_lock lock(mutex_);
        CHECK(changed_.wait_for(lock, std::chrono::seconds(20), [this] { return waiting_ > 0; }));
    }
    // Somebody waits all the time.
    void go_on() {
        std::lock_guard lock(mutex_);
        CHECK(waiting_ > 0 && !gave_up_);
        stalled_ = false;
        changed_.notify_all();
    }

private:
    bool is_done() override {
        ++asked_;
        std::unique_lock lock(mutex_);
        if (stalled_) {
            ++waiting_;
            changed_.notify_all();
            // Not for ever, so that a test ends that fails.
            gave_up_ |=
                !changed_.wait_for(lock, std::chrono::seconds(10), [&] { return !stalled_; });
            --waiting_;
        }
        return done_;
    }

    std::atomic<bool> done_{false};
    std::atomic<uint64_t> asked_{0};
    std::mutex mutex_;
    std::condition_variable changed_;
    bool stalled_ = false, gave_up_ = false;
    int waiting_ = 0;
};

constexpr uint64_t kBytes = 100'000; // more than a submitting call moves itself

struct Test {
    const std::shared_ptr<kvf::Engine> engine;
    const uint32_t device; // the host or the GPU
    const kvf::Direction direction;
    const uint32_t priority;
    static constexpr uint64_t kPlaces = 8;
    const DeviceMemory on_device = DeviceMemory(kPlaces * kBytes);
    Bytes on_host = Bytes(kPlaces * kBytes), buffer = Bytes(kBytes);
    uint64_t submitted = 0;

    // What has been moved is not looked at: one thread copies to and from the buffer, which all
    // jobs share. On the device jobs with a gate, of which one moves at a time, have a place of
    // their own, and the others the rest.
    std::shared_ptr<kvf::Job> submit(std::shared_ptr<kvf::Gate> gate = nullptr) {
        kvf::Submission submission = make_submission(direction, buffer.data(), buffer.size());
        const uint64_t place = gate ? 0 : 1 + submitted++ % (kPlaces - 1);
        submission.gate = std::move(gate);
        kvf::LayoutBuilder builder;
        const uint64_t memory =
            device ? on_device.address() : reinterpret_cast<uint64_t>(on_host.data());
        builder.add(memory + place * kBytes, 0, kBytes);
        return kvf::submit_job(*engine, std::move(submission),
                               make_recorded(device, builder.finish()), options_of(priority),
                               nullptr);
    }
};

int32_t end_of(const std::shared_ptr<kvf::Job> &job) { return finish(job).status; }

void who_submits_or_cancels_does_not_wait_for_an_answer(Test &test) {
    const auto gate = std::make_shared<TestGate>();
    const auto job = test.submit(gate), cancelled = test.submit(gate);
    gate->stall();
    gate->wait_until_somebody_waits();
    const auto other = test.submit();
    cancelled->cancel();
    CHECK(end_of(cancelled) == KVF_ERR_CANCELLED);
    gate->go_on();
    CHECK(end_of(other) == KVF_OK);
    gate->open();
    CHECK(end_of(job) == KVF_OK);
}

void each_begins_when_its_own_stream_is_done(Test &test) {
    constexpr size_t kJobs = 3 * kvf::GateCheck::kMost;
    std::vector<std::shared_ptr<TestGate>> gates;
    std::vector<std::shared_ptr<kvf::Job>> jobs;
    for (size_t i = 0; i < kJobs; ++i) {
        gates.push_back(std::make_shared<TestGate>());
        jobs.push_back(test.submit(gates.back()));
    }
    for (size_t i = 0; i < kJobs; ++i) {
        const size_t next = i * 7 % kJobs;
        CHECK(!jobs[next]->ended(nullptr));
        gates[next]->open();
        CHECK(end_of(jobs[next]) == KVF_OK);
    }
}

void it_begins_beside_others_that_keep_coming(Test &test) {
    const auto gate = std::make_shared<TestGate>();
    const auto job = test.submit(gate);
    std::shared_ptr<kvf::Job> others[3] = {test.submit(), test.submit(), test.submit()};
    gate->open();
    const int64_t begin = clock_ns();
    for (size_t i = 0; !job->ended(nullptr); ++i) {
        CHECK(clock_ns() - begin < 20 * SECONDS);
        CHECK(end_of(std::exchange(others[i % 3], test.submit())) == KVF_OK);
    }
    for (const auto &other : others) CHECK(end_of(other) == KVF_OK);
}

} // namespace

int main() {
    const Context context;
    const Holdings holdings;
    {
        const auto engine = make_cuda_engine(1);
        for (const uint32_t device : {0u, 1u}) {
            for (const auto direction : {kvf::Direction::Save, kvf::Direction::Load}) {
                for (const uint32_t priority : {KVF_PRIORITY_BACKGROUND, KVF_PRIORITY_URGENT}) {
                    Test test{engine, device, direction, priority};
                    who_submits_or_cancels_does_not_wait_for_an_answer(test);
                    each_begins_when_its_own_stream_is_done(test);
                    it_begins_beside_others_that_keep_coming(test);
                }
            }
        }
        engine->close();
    }
    holdings.check_same();
    return 0;
}
