// No handler of the program's runs on a thread of the library: signals are blocked there, but for
// those of a thread's own faults.
#include <dirent.h>

#include <csignal>
#include <fstream>
#include <map>

#include "cuda.hpp"

namespace {

// The line of a thread's status that begins with `name`; "" if the thread has ended.
std::string status_line(const std::string &task, const std::string &name) {
    std::ifstream file("/proc/self/task/" + task + "/status");
    for (std::string line; std::getline(file, line);) {
        if (line.starts_with(name + ":\t")) return line.substr(name.size() + 2);
    }
    return "";
}

// The signals that each thread of the library blocks, as a bit mask, by the thread's name.
std::map<std::string, uint64_t> look() {
    std::map<std::string, uint64_t> blocked;
    DIR *const tasks = opendir("/proc/self/task");
    CHECK(tasks);
    while (const dirent *const task = readdir(tasks)) {
        const std::string name = status_line(task->d_name, "Name");
        if (!name.starts_with("kvf-")) continue;
        const std::string mask = status_line(task->d_name, "SigBlk");
        if (!mask.empty()) blocked[name] = std::stoull(mask, nullptr, 16);
    }
    closedir(tasks);
    return blocked;
}

// Waits until threads of all these names have been seen; whatever is seen must block what it
// should.
void check_threads(std::vector<std::string> names) {
    const int64_t until = clock_ns() + 20 * SECONDS;
    while (!names.empty()) {
        for (const auto &[name, blocked] : look()) {
            for (int signal = 1; signal < 32; ++signal) {
                const bool fault = signal == SIGSEGV || signal == SIGBUS || signal == SIGFPE ||
                                   signal == SIGILL || signal == SIGTRAP || signal == SIGSYS;
                if (signal == SIGKILL || signal == SIGSTOP) continue; // nobody can block them
                if ((blocked >> (signal - 1) & 1) == !fault) continue;
                fprintf(stderr, "%s blocks %llx: signal %d\n", name.c_str(),
                        static_cast<unsigned long long>(blocked), signal);
                exit(1);
            }
            CHECK(blocked >> (SIGRTMAX - 1) & 1);
            std::erase(names, name);
        }
        if (clock_ns() < until) continue;
        fprintf(stderr, "no thread %s\n", names.front().c_str());
        exit(1);
    }
}

} // namespace

int main() {
    const Context context;
    sigset_t before, after;
    CHECK(pthread_sigmask(SIG_SETMASK, nullptr, &before) == 0);
    Engine engine;
    {
        const DeviceMemory device(MiB);
        Bytes host(MiB);
        const Buffer pinned(engine, Kind::Pool, MiB), pageable(engine, Kind::Pageable, MiB);
        kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
        options.callback = [](const kvf_completion *) {};
        for (const Way way : {Way::Save, Way::Load}) {
            succeed(start(engine, way, {{device.address(), MiB, 1, 0, 0, 0}}, pageable, options));
            succeed(start(engine, way, {plain_region(host.data(), MiB, 0)}, pinned, options));
        }
        void *buffer;
        CHECK_OK(kvf_buffer_alloc(engine, 1, &buffer));
        CHECK_OK(kvf_buffer_free(buffer));
        check_threads(
            {"kvf-save-0", "kvf-load-0", "kvf-copy", "kvf-host", "kvf-dispatch", "kvf-pool"});

        // Memory is mapped by threads of their own, which are gone when it has been.
        std::atomic<bool> seen{false};
        std::thread mapping([&] {
            while (!seen) {
                CHECK_OK(kvf_buffer_alloc(engine, 128 * MiB, &buffer));
                CHECK_OK(kvf_buffer_free(buffer));
                CHECK_OK(kvf_buffer_trim(engine));
            }
        });
        check_threads({"kvf-map"});
        seen = true;
        mapping.join();
    }
    // The caller's own thread is as it was.
    CHECK(pthread_sigmask(SIG_SETMASK, nullptr, &after) == 0);
    for (int signal = 1; signal < 32; ++signal) {
        CHECK(sigismember(&before, signal) == sigismember(&after, signal));
    }
    return 0;
}
