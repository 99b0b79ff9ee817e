// A job on two devices, of which one is lost, ends soon: its leg on the other one does not wait for
// the stream that it follows.
#include "cuda.hpp"

namespace {

constexpr uint64_t kBytes = MiB;

// Memory of both devices, and a stream of the first that is at work.
struct Test {
    const Context first = Context(0);
    const DeviceMemory on_first = DeviceMemory(kBytes);
    const Stream stream;
    Barrier barrier;
    const Context second = Context(1);
    const DeviceMemory on_second = DeviceMemory(kBytes);
    Engine engine;
    const Buffer buffer = Buffer(engine, Kind::Pool, 2 * kBytes);

    Test() {
        first.adopt();
        barrier.close(stream);
    }
    ~Test() {
        barrier.open();
        stream.synchronize();
    }
    kvf_job start_on_both() const {
        kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
        options.flags = KVF_SUBMIT_FOLLOW_STREAM;
        options.stream = stream.number();
        return start(engine, Way::Save,
                     {{on_first.address(), kBytes, 1, 0, 0, 0},
                      {on_second.address(), kBytes, 1, 0, kBytes, 0}},
                     buffer, options);
    }
    kvf_job start_on_second() const {
        return start(engine, Way::Save, {{on_second.address(), kBytes, 1, 0, 0, 0}}, buffer);
    }
};

void check_lost(kvf_job job) { CHECK(finish(job).status == KVF_ERR_DEVICE_LOST); }

void found_out_by_a_copy() {
    const Test test;
    const kvf_job job = test.start_on_both();
    CHECK(driver().lose_device(1, CUDA_ERROR_ILLEGAL_ADDRESS, 0) == 0);
    check_lost(test.start_on_second());
    check_lost(job);
}

void known_when_its_leg_comes() {
    const Test test;
    CHECK(driver().lose_device(1, CUDA_ERROR_ILLEGAL_ADDRESS, 0) == 0);
    check_lost(test.start_on_second());
    check_lost(test.start_on_both());
}

void given_up() {
    Test test;
    const kvf_job job = test.start_on_both();
    driver().hold("copy", 1, 1);
    check_lost(test.start_on_second());
    check_lost(job);
    exit(0); // to free the memory that this test has would wait for the copy
}

} // namespace

int main() {
    setenv("KVFERRY_STUCK_SECONDS", "1", 1);
    need_simulation(2);
    found_out_by_a_copy();
    known_when_its_leg_comes();
    given_up();
}
