// Threads of the library's are named; a pump whose jobs all wait for streams looks at these now and
// then, and begins soon after they are done.
#include <filesystem>
#include <fstream>
#include <set>

#include "cuda.hpp"

namespace {

std::set<std::string> thread_names() {
    std::set<std::string> names;
    for (const auto &task : std::filesystem::directory_iterator("/proc/self/task")) {
        std::ifstream file(task.path() / "comm");
        std::string name;
        if (std::getline(file, name)) names.insert(name);
    }
    return names;
}

} // namespace

int main() {
    need_simulation();
    const Driver &d = driver();
    Random random(23);
    const uint64_t bytes = MiB;
    const Context context;
    const Holdings holdings;
    Engine engine;
    {
        const DeviceMemory device(random_bytes(random, bytes));
        Bytes host(bytes);
        const Regions regions = {{device.address(), bytes, 1, 0, 0, 0},
                                 plain_region(host.data(), bytes, bytes)};
        const Buffer buffer(engine, Kind::Pageable, 2 * bytes);
        const Stream stream;
        Barrier barrier;
        barrier.close(stream);
        kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
        options.priority = KVF_PRIORITY_URGENT;
        options.flags = KVF_SUBMIT_FOLLOW_STREAM;
        options.stream = stream.number();
        options.callback = [](const kvf_completion *) {};
        // Of a device alone: the host looks at it in its own time.
        const kvf_job job = start(engine, Way::Save, {regions[0]}, buffer, options);
        sleep_ms(50);
        const uint64_t before = d.calls("cuEventQuery");
        sleep_ms(400);
        CHECK(d.calls("cuEventQuery") - before <= 500);

        // It still notices what comes at once, and the stream within a millisecond or two.
        const int64_t begin = clock_ns();
        succeed(start(engine, Way::Save, regions, buffer));
        CHECK(clock_ns() - begin < 300 * MILLISECONDS);
        const kvf_job load = start(engine, Way::Load, regions, buffer, options);
        barrier.open();
        succeed(job);
        succeed(load);
        stream.synchronize();

        const std::set<std::string> names = thread_names();
        for (const char *name :
             {"kvf-save-0", "kvf-load-0", "kvf-copy", "kvf-host", "kvf-dispatch"}) {
            if (!names.contains(name)) fprintf(stderr, "no thread is called %s\n", name);
            CHECK(names.contains(name));
        }
    }
    engine.destroy();
    holdings.check_same();
    return 0;
}
