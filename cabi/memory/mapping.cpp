#include "memory/mapping.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>
#include <thread>
#include <vector>

#include "core/status.h"
#include "core/thread.h"
#include "memory/pages.h"

namespace kvf {
namespace {

constexpr uint64_t kHugePage = 2 << 20;

void touch(char *from, char *to) {
#if defined(MADV_POPULATE_WRITE)
    if (madvise(from, static_cast<size_t>(to - from), MADV_POPULATE_WRITE) == 0) return;
    if (errno != EINVAL) return; // for want of memory, say: whoever uses the pages will see
#endif
    const uint64_t page = page_size(); // a kernel older than 5.14
    for (char *at = from; at < to; at += page) *static_cast<volatile char *>(at) = 0;
}

} // namespace

void populate_memory(char *begin, uint64_t bytes) {
    const uint64_t threads = std::clamp<uint64_t>(bytes / (32 << 20), 1, 4);
    const uint64_t share = round_up(bytes / threads, kHugePage);
    std::vector<std::thread> helpers;
    helpers.reserve(threads); // no thread that was started may be lost for want of memory
    char *at = begin;
    char *const end = begin + bytes;
    try {
        for (; static_cast<uint64_t>(end - at) > share; at += share) {
            helpers.push_back(start_thread([at, share] {
                name_thread("kvf-map");
                touch(at, at + share);
            }));
        }
    } catch (const std::exception &) {
        // The system refuses a thread: this one does the rest.
    }
    touch(at, end);
    for (auto &helper : helpers) helper.join();
}

char *map_memory(uint64_t bytes) {
    // Large buffers start at a huge page: fewer faults, and fewer pages to pin.
    const uint64_t slack = bytes >= kHugePage ? kHugePage : 0;
    void *mapped =
        mmap(nullptr, bytes + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) {
        throw Error(KVF_ERR_OUT_OF_MEMORY, format("mmap: %s", std::strerror(errno)));
    }
    auto *begin = static_cast<char *>(mapped);
    if (slack) {
        auto *aligned =
            reinterpret_cast<char *>(round_up(reinterpret_cast<uint64_t>(begin), slack));
        char *const end = begin + bytes + slack;
        if (aligned > begin) munmap(begin, static_cast<size_t>(aligned - begin));
        if (end > aligned + bytes) {
            munmap(aligned + bytes, static_cast<size_t>(end - aligned - bytes));
        }
        begin = aligned;
        madvise(begin, bytes, MADV_HUGEPAGE); // a wish: without it everything works the same
    }
    return begin;
}

} // namespace kvf
