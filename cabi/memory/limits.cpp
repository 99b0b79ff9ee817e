#include "memory/limits.h"

#include <algorithm>
#include <array>
#include <fstream>
#include <optional>
#include <sstream>
#include <string_view>

namespace kvf {

// The files of a version of control groups, and what its memory.stat calls the pages that the
// system drops before it kills anybody: they are in use, and still available.
struct MemoryLimits::Version {
    bool unified;              // one hierarchy for all controllers
    const char *limit, *usage; // names of files
    std::array<std::string_view, 3> reclaimable;
};

const MemoryLimits::Version MemoryLimits::kVersions[] = {
    {false,
     "memory.limit_in_bytes",
     "memory.usage_in_bytes",
     {"total_inactive_file", "total_active_file"}},
    {true, "memory.max", "memory.current", {"inactive_file", "active_file", "slab_reclaimable"}},
};

namespace {

// Version 1 has no word for "no limit", but a number that is nearly this.
constexpr uint64_t kLargestLimit = uint64_t{1} << 62;

// None for "max", and where there is no such file.
std::optional<uint64_t> read_number(const std::string &path) {
    std::ifstream file(path);
    uint64_t value;
    if (!(file >> value)) return std::nullopt;
    return value;
}

uint64_t read_sum(const std::string &path, const std::array<std::string_view, 3> &wanted) {
    std::ifstream file(path);
    uint64_t sum = 0;
    std::string name;
    for (uint64_t bytes; file >> name >> bytes;) {
        if (std::find(wanted.begin(), wanted.end(), name) != wanted.end()) sum += bytes;
    }
    return sum;
}

bool has_word(const std::string &list, std::string_view word) {
    std::istringstream words(list);
    for (std::string one; std::getline(words, one, ',');) {
        if (one == word) return true;
    }
    return false;
}

// The process's group among those that limit memory; a path within the hierarchy.
std::optional<std::string> group_of(const std::string &root, bool unified) {
    std::ifstream file(root + "/proc/self/cgroup");
    for (std::string line; std::getline(file, line);) {
        // number:controllers:path
        const size_t first = line.find(':'), second = line.find(':', first + 1);
        if (second == std::string::npos) continue;
        const std::string controllers = line.substr(first + 1, second - first - 1);
        const bool of_version = unified ? controllers.empty() : has_word(controllers, "memory");
        if (of_version && line.compare(second + 1, 1, "/") == 0) return line.substr(second + 1);
    }
    return std::nullopt;
}

struct Mount {
    std::string root, point; // what of the hierarchy is mounted, and where
};

std::optional<Mount> mount_of(const std::string &root, bool unified) {
    std::ifstream file(root + "/proc/self/mountinfo");
    for (std::string line; std::getline(file, line);) {
        // id parent device root point options [more]... - type source options
        const size_t dash = line.find(" - ");
        if (dash == std::string::npos) continue;
        std::istringstream before(line.substr(0, dash)), after(line.substr(dash + 3));
        std::string skip, type, options;
        Mount mount;
        before >> skip >> skip >> skip >> mount.root >> mount.point;
        after >> type >> skip >> options;
        if (type != (unified ? "cgroup2" : "cgroup")) continue;
        if (!unified && !has_word(options, "memory")) continue;
        return mount;
    }
    return std::nullopt;
}

uint64_t read_machine(const std::string &root) {
    std::ifstream file(root + "/proc/meminfo");
    std::string name;
    for (uint64_t kib; file >> name >> kib; file.ignore(16, '\n')) {
        if (name == "MemAvailable:") return kib << 10;
    }
    return 0;
}

} // namespace

MemoryLimits::MemoryLimits(std::string root) : root_(std::move(root)) {
    for (const Version &version : kVersions) find_groups(version);
}

// The limits of a group hold for what is in it, and so do those of all groups that it lies in.
void MemoryLimits::find_groups(const Version &version) {
    const auto group = group_of(root_, version.unified);
    const auto mount = mount_of(root_, version.unified);
    if (!group || !mount) return;
    // In a container the mount begins with its own group, or the group's path with the container.
    std::string path = *group == "/" ? "" : *group;
    if (mount->root != "/") {
        const bool below = (path + '/').starts_with(mount->root + '/');
        path = below ? path.substr(mount->root.size()) : "";
    }
    if (path.find("/..") != std::string::npos) path.clear(); // outside of what is mounted
    for (;;) {
        groups_.push_back({&version, root_ + mount->point + path + "/"});
        if (path.empty()) return;
        path.erase(path.rfind('/'));
    }
}

AvailableMemory MemoryLimits::available() const {
    AvailableMemory available;
    available.machine = read_machine(root_);
    for (const auto &[version, folder] : groups_) {
        const auto limit = read_number(folder + version->limit);
        if (!limit || *limit >= kLargestLimit) continue;
        const auto usage = read_number(folder + version->usage);
        if (!usage) continue;
        const uint64_t reclaimable = read_sum(folder + "memory.stat", version->reclaimable);
        const uint64_t taken = *usage - std::min(*usage, reclaimable);
        const uint64_t left = *limit - std::min(*limit, taken);
        if (left >= available.group) continue;
        available.group = left;
        available.group_limit = *limit;
    }
    return available;
}

} // namespace kvf
