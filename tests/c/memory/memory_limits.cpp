// How much memory may be taken, within the machine and within control groups of either version; and
// what the pool does where it is short. The files that tell are written here.
#include "memory/limits.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <vector>

#include "check.hpp"
#include "memory/pool.h"

using kvf::AvailableMemory;
using kvf::MemoryLimits;

namespace {

constexpr uint64_t MiB = 1 << 20;

// A folder of files in place of the system's.
class System {
public:
    System() {
        char folder[] = "/tmp/kvferry-limits-XXXXXX";
        CHECK(mkdtemp(folder));
        root = folder;
        write("/proc/meminfo",
              "MemTotal: 4096 kB\nMemFree: 10 kB\nMemAvailable:    2048000 kB\nCached: 1 kB\n");
    }
    ~System() { std::filesystem::remove_all(root); }
    System(const System &) = delete;
    System &operator=(const System &) = delete;

    void write(const std::string &path, const std::string &text) const {
        std::filesystem::create_directories(std::filesystem::path(root + path).parent_path());
        std::ofstream(root + path) << text;
    }
    // A group of version 2.
    void write_group(const std::string &folder, const std::string &limit, uint64_t usage,
                     uint64_t reclaimable = 0) const {
        write(folder + "/memory.max", limit + "\n");
        write(folder + "/memory.current", std::to_string(usage) + "\n");
        write(folder + "/memory.stat",
              "anon 5\nfile 7\ninactive_file " + std::to_string(reclaimable) + "\nactive_file 0\n");
    }
    void write_mounts(const std::string &lines) const {
        write("/proc/self/mountinfo", "22 1 0:5 / /proc rw - proc proc rw\n" + lines);
    }
    AvailableMemory available() const { return MemoryLimits(root).available(); }

    std::string root;
};

void without_groups_it_is_the_machine_s() {
    const System system;
    const AvailableMemory available = system.available();
    CHECK(available.machine == 2000 * MiB);
    CHECK(available.group == AvailableMemory::kNoLimit && available.least() == 2000 * MiB);
    CHECK(MemoryLimits(system.root + "/nothing").available().least() == 0); // not told
}

void this_machine_tells() { CHECK(MemoryLimits().available().machine > 0); }

void version_2() {
    const System system;
    system.write("/proc/self/cgroup", "0::/user.slice/job\n");
    system.write_mounts("30 1 0:6 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n");
    system.write_group("/sys/fs/cgroup/user.slice/job", std::to_string(1000 * MiB), 300 * MiB);
    CHECK(system.available().group == 700 * MiB && system.available().least() == 700 * MiB);
    CHECK(system.available().group_limit == 1000 * MiB);
    // Pages of files go before anybody is killed.
    system.write_group("/sys/fs/cgroup/user.slice/job", std::to_string(1000 * MiB), 300 * MiB,
                       50 * MiB);
    CHECK(system.available().group == 750 * MiB);
    // The limit of a group around it is tighter.
    system.write_group("/sys/fs/cgroup/user.slice", std::to_string(2000 * MiB), 1400 * MiB);
    CHECK(system.available().group == 600 * MiB && system.available().group_limit == 2000 * MiB);
    system.write_group("/sys/fs/cgroup/user.slice", "max", 1400 * MiB);
    CHECK(system.available().group == 750 * MiB);
    // More is taken than the limit allows, as after it was lowered.
    system.write_group("/sys/fs/cgroup/user.slice/job", std::to_string(100 * MiB), 300 * MiB);
    CHECK(system.available().group == 0);
    system.write_group("/sys/fs/cgroup/user.slice/job", "max", 300 * MiB);
    CHECK(system.available().group == AvailableMemory::kNoLimit);
}

void version_2_in_a_container() {
    const System system;
    // With a namespace of its own, and without one, where the mount begins with the container.
    system.write("/proc/self/cgroup", "0::/\n");
    system.write_mounts("30 1 0:6 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n");
    system.write_group("/sys/fs/cgroup", std::to_string(512 * MiB), 12 * MiB);
    CHECK(system.available().group == 500 * MiB);
    system.write("/proc/self/cgroup", "0::/docker/abc/inner\n");
    system.write_mounts("30 1 0:6 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup rw\n");
    system.write_group("/sys/fs/cgroup/inner", std::to_string(256 * MiB), 6 * MiB);
    CHECK(system.available().group == 250 * MiB);
    // A process that was moved out of what is mounted.
    for (const char *group : {"0::/docker/abcd\n", "0::/../other\n", "0::/docker/abc\n"}) {
        system.write("/proc/self/cgroup", group);
        CHECK(system.available().group == 500 * MiB);
    }
}

void version_1() {
    const System system;
    const std::string folder = "/sys/fs/cgroup/memory/docker/abc";
    system.write("/proc/self/cgroup",
                 "9:name=systemd:/\n5:cpu,memory:/docker/abc\n1:cpuset:/docker\n0::/\n");
    system.write_mounts("32 31 0:29 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
                        "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,cpu,memory\n"
                        "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n");
    system.write(folder + "/memory.limit_in_bytes", std::to_string(800 * MiB));
    system.write(folder + "/memory.usage_in_bytes", std::to_string(200 * MiB));
    system.write(folder + "/memory.stat", "inactive_file 1\ntotal_inactive_file " +
                                              std::to_string(20 * MiB) + "\ntotal_active_file " +
                                              std::to_string(5 * MiB) + "\n");
    system.write("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
    system.write("/sys/fs/cgroup/memory/memory.usage_in_bytes", std::to_string(900 * MiB));
    CHECK(system.available().group == 625 * MiB && system.available().group_limit == 800 * MiB);
    system.write("/sys/fs/cgroup/memory/docker/memory.limit_in_bytes", std::to_string(500 * MiB));
    system.write("/sys/fs/cgroup/memory/docker/memory.usage_in_bytes", std::to_string(400 * MiB));
    CHECK(system.available().group == 100 * MiB);
}

void files_that_say_nothing_set_no_limit() {
    const System system;
    system.write("/proc/self/cgroup", "nonsense\n::\n0::elsewhere\n0::/job\n");
    CHECK(system.available().group == AvailableMemory::kNoLimit);
    system.write_mounts("nonsense\n- - -\n30 1 0:6 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n");
    CHECK(system.available().group == AvailableMemory::kNoLimit);
    system.write_group("/sys/fs/cgroup/job", "many", 0);
    CHECK(system.available().group == AvailableMemory::kNoLimit);
}

// ---- The pool -----------------------------------------------------------------------------------

class FakePinner final : public kvf::Pinner {
public:
    void pin(void *, uint64_t) override {}
    bool unpin(void *, uint64_t) noexcept override { return true; }
    bool is_pinned(const void *, uint64_t) const override { return false; }
};

bool has_pages(const void *memory, uint64_t bytes) {
    const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    std::vector<unsigned char> resident(bytes / page);
    CHECK(mincore(const_cast<void *>(memory), bytes, resident.data()) == 0);
    return std::all_of(resident.begin(), resident.end(), [](auto each) { return each & 1; });
}

class Limited {
public:
    Limited() {
        system.write("/proc/self/cgroup", "0::/\n");
        system.write_mounts("30 1 0:6 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n");
    }
    void leave(uint64_t bytes) const {
        system.write_group("/sys/fs/cgroup", std::to_string(64 * MiB), 64 * MiB - bytes);
    }
    System system;
};

// What is pinned is taken, all of it: the process would be killed.
void the_pool_pins_no_more_than_a_group_may_take() {
    const Limited limited;
    const auto pool = std::make_shared<kvf::Pool>(0, std::make_shared<FakePinner>(),
                                                  MemoryLimits(limited.system.root));
    limited.leave(16 * MiB);
    void *const buffer = pool->alloc(8 * MiB);
    CHECK(has_pages(buffer, 8 * MiB));
    limited.leave(8 * MiB);
    try {
        pool->alloc(12 * MiB);
        CHECK(!"refused");
    } catch (const kvf::Error &error) {
        CHECK(error.status == KVF_ERR_OUT_OF_MEMORY);
        CHECK(error.detail == "56 MiB of the control group's 64 MiB taken, 12 MiB wanted");
    }
    CHECK(pool->usage().mapped == 8 * MiB);
    kvf::free_buffer(buffer);
    CHECK(pool->usage().free == 8 * MiB);
    limited.leave(20 * MiB);
    kvf::free_buffer(pool->alloc(12 * MiB));
}

// It may be meant to be used in part.
void the_pool_maps_pageable_memory_and_takes_no_pages_beyond_the_limit() {
    const Limited limited;
    const auto pool = std::make_shared<kvf::Pool>(0, nullptr, MemoryLimits(limited.system.root));
    limited.leave(8 * MiB);
    void *const small = pool->alloc(4 * MiB), *const large = pool->alloc(16 * MiB);
    CHECK(has_pages(small, 4 * MiB));
    CHECK(!has_pages(large, 16 * MiB));
    kvf::free_buffer(small);
    kvf::free_buffer(large);
}

} // namespace

int main() {
    without_groups_it_is_the_machine_s();
    this_machine_tells();
    version_2();
    version_2_in_a_container();
    version_1();
    files_that_say_nothing_set_no_limit();
    the_pool_pins_no_more_than_a_group_may_take();
    the_pool_maps_pageable_memory_and_takes_no_pages_beyond_the_limit();
    return 0;
}
