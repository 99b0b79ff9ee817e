// How much more memory the process may take: of the machine's, and within its control groups
// (cgroups).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace kvf {

struct AvailableMemory {
    static constexpr uint64_t kNoLimit = UINT64_MAX;

    uint64_t machine = 0; // without swapping, as the system estimates it; 0 where it does not tell
    // What is left until the tightest control group's limit, beyond which the system kills
    // processes; and that limit.
    uint64_t group = kNoLimit;
    uint64_t group_limit = kNoLimit;

    uint64_t least() const { return machine < group ? machine : group; }
};

class MemoryLimits {
public:
    // Finds the process's control groups, of version 1 and 2, in the files of /proc below `root`,
    // "" for the system's own. (It takes half a millisecond, and a process hardly ever moves to
    // another group: so it is done once.)
    explicit MemoryLimits(std::string root = "");

    // As it is now. Some tens of microseconds.
    AvailableMemory available() const;

private:
    struct Version;
    struct Group {
        const Version *version;
        std::string folder;
    };
    void find_groups(const Version &version);

    static const Version kVersions[];

    const std::string root_;
    std::vector<Group> groups_; // each limits the process
};

} // namespace kvf
