#include "memory/memory.h"

#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <new>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "core/fork.h"
#include "core/thread.h"

namespace kvf {
namespace {

constexpr uint64_t kHugePage = 2 << 20;
constexpr uint64_t kIdleNs = 30'000'000'000;
// Reading the list of mappings takes as long as so many questions about pages (300 us against 0.1 to 0.9 us each).
constexpr uint64_t kManyQuestions = 512;

uint64_t page_size() {
    static const uint64_t size = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    return size;
}

uint64_t round_up(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

// Every known range of the process by its first address; ranges do not overlap.
struct Registry {
    using Ranges = std::map<uint64_t, std::shared_ptr<KnownMemory>>;
    std::mutex mutex;
    Ranges ranges;

    Registry() {
        // The child forgets the parent's: their pools' locks may be held by threads that it does not
        // have, and where pinned memory was, the child has nothing, or soon something else.
        on_fork([this] { mutex.lock(); }, [this] { mutex.unlock(); },
                [this] {
                    new (&ranges) Ranges;
                    mutex.unlock();
                });
    }

    std::shared_ptr<KnownMemory> holding(uint64_t begin, uint64_t bytes) {
        auto it = ranges.upper_bound(begin);
        if (it == ranges.begin()) return nullptr;
        const auto &known = (--it)->second;
        return begin + bytes <= known->begin + known->bytes ? known : nullptr;
    }

    bool overlaps(uint64_t begin, uint64_t bytes) {
        auto it = ranges.lower_bound(begin);
        if (it != ranges.end() && it->first < begin + bytes) return true;
        if (it == ranges.begin()) return false;
        --it;
        return it->first + it->second->bytes > begin;
    }

    // Takes the range that starts at `begin` out, if no job uses it.
    Ranges::node_type remove(uint64_t begin, bool of_pool) {
        std::lock_guard lock(mutex);
        auto it = ranges.find(begin);
        if (it == ranges.end() || (it->second->pool != nullptr) != of_pool) {
            throw Error(KVF_ERR_INVALID_ARGUMENT,
                        of_pool ? "not an allocated buffer; has it been freed before?"
                                : "not the start of a registered range");
        }
        if (it->second->users.load(std::memory_order_acquire)) {
            throw Error(KVF_ERR_BUSY, "a job in flight uses the buffer");
        }
        return ranges.extract(it);
    }
};

Registry &registry() {
    static Registry *registry =
        new Registry; // never destroyed: jobs may outlive static destructors
    return *registry;
}

// Mapped is not enough: the CUDA driver reserves the addresses of device memory without access. With an
// action that does not exist, this call reads the signal set that it is given, and then fails: EFAULT
// says that it could not read. (The trick is that of Abseil's address_is_readable.cc.)
bool is_readable(uint64_t address) {
    constexpr int kNoSuchAction = ~0;
    constexpr size_t kSignalSet = 8;        // the kernel's; what is read is aligned to it
    if (address < kSignalSet) return false; // NULL would not be read
    const int saved = errno;
    syscall(SYS_rt_sigprocmask, kNoSuchAction, address & ~uint64_t{kSignalSet - 1}, nullptr,
            kSignalSet);
    const bool readable = errno != EFAULT;
    errno = saved;
    return readable;
}

// Without writing anything: FUTEX_WAKE_OP changes a word atomically, here to what it is, so that whoever writes there at
// the same time loses nothing, and fails with EFAULT where it may not. Nobody waits at these words. (Under a
// microsecond.)
bool is_page_writable(uint64_t address) {
    static uint32_t nobody_waits = 0;
    constexpr uint32_t kOrNothing = FUTEX_OP(FUTEX_OP_OR, 0, FUTEX_OP_CMP_EQ, 0);
    const int saved = errno;
    const long result = syscall(SYS_futex, &nobody_waits, FUTEX_WAKE_OP | FUTEX_PRIVATE_FLAG, 0,
                                nullptr, address & ~uint64_t{sizeof(uint32_t) - 1}, kOrNothing);
    const bool writable = result >= 0 || errno != EFAULT;
    errno = saved;
    return writable;
}

// Takes the pages of new memory now, by several threads where it is much: the first transfer would pay for
// them otherwise, and the driver pins memory that is there ten times as fast (32 ms against 374 ms for 1
// GiB beside an H200).
void populate(char *begin, uint64_t bytes, const AvailableMemory &available) {
    const uint64_t threads = std::clamp<uint64_t>(bytes / (32 << 20), 1, 4);
    const uint64_t share = round_up(bytes / threads, kHugePage);
    const auto touch = [](char *from, char *to) {
#if defined(MADV_POPULATE_WRITE)
        if (madvise(from, static_cast<size_t>(to - from), MADV_POPULATE_WRITE) == 0) return;
        if (errno != EINVAL) return; // no memory, say: whoever uses the pages will see
#endif
        const uint64_t page = page_size(); // a kernel older than 5.14
        for (char *at = from; at < to; at += page) *static_cast<volatile char *>(at) = 0;
    };
    if (bytes > available.least()) return; // its owner may not mean to use it all
    std::vector<std::thread> helpers;
    helpers.reserve(threads); // one that has been started must find its place
    char *at = begin;
    char *const end = begin + bytes;
    try {
        for (; static_cast<uint64_t>(end - at) > share; at += share) {
            helpers.push_back(start_thread([touch, at, share] {
                name_thread("kvf-map");
                touch(at, at + share);
            }));
        }
    } catch (const std::exception &) {
        // No thread to be had: this one does the rest.
    }
    touch(at, end);
    for (auto &helper : helpers) helper.join();
}

} // namespace

uint64_t idle_ns() {
    static const uint64_t value = seconds_from_environment("KVFERRY_IDLE_SECONDS", kIdleNs);
    return value;
}

std::shared_ptr<MemoryUse> use_memory(const void *buffer, uint64_t bytes) {
    std::lock_guard lock(registry().mutex);
    auto known = registry().holding(reinterpret_cast<uint64_t>(buffer), bytes);
    return known ? std::make_shared<MemoryUse>(std::move(known)) : nullptr;
}

void register_memory(void *buffer, uint64_t bytes, std::shared_ptr<Pinner> pinner) {
    if (!buffer || bytes == 0) throw Error(KVF_ERR_INVALID_ARGUMENT, "buffer is NULL or empty");
    auto known = std::make_shared<KnownMemory>();
    known->begin = reinterpret_cast<uint64_t>(buffer);
    known->bytes = bytes;
    if (known->begin + bytes < known->begin)
        throw Error(KVF_ERR_INVALID_ARGUMENT, "range overflows");
    if (!MappedCheck()(known->begin, bytes)) {
        throw Error(KVF_ERR_INVALID_ARGUMENT, "the range is not mapped");
    }
    {
        // Entered first, pinned second: of two threads with overlapping ranges one is refused.
        std::lock_guard lock(registry().mutex);
        if (registry().overlaps(known->begin, bytes)) {
            throw Error(KVF_ERR_BUSY, "overlaps a registered range or a buffer");
        }
        registry().ranges.emplace(known->begin, known);
        if (!pinner) return;
        known->users = 1; // it cannot be unregistered while it is being pinned
    }
    try {
        pinner->pin(buffer, bytes);
    } catch (...) {
        std::lock_guard lock(registry().mutex);
        registry().ranges.erase(known->begin);
        throw;
    }
    std::lock_guard lock(registry().mutex);
    known->pinned = true;
    known->pinner = std::move(pinner);
    known->users.fetch_sub(1, std::memory_order_release);
}

void unregister_memory(void *buffer) {
    auto node = registry().remove(reinterpret_cast<uint64_t>(buffer), false);
    KnownMemory &known = *node.mapped();
    if (!known.pinner || known.pinner->unpin(buffer, known.bytes)) return;
    std::lock_guard lock(registry().mutex);
    known.pinned = false; // its owner may unmap it all the same: copies go round it from now on
    registry().ranges.insert(std::move(node));
    throw Error(KVF_ERR_DEVICE_LOST, "a copy did not end, and the driver still has the range");
}

bool is_registered(const void *buffer) {
    std::lock_guard lock(registry().mutex);
    const auto it = registry().ranges.find(reinterpret_cast<uint64_t>(buffer));
    return it != registry().ranges.end() && !it->second->pool;
}

void free_buffer(void *buffer) {
    if (!buffer) return;
    const auto node = registry().remove(reinterpret_cast<uint64_t>(buffer), true);
    node.mapped()->pool->take_back(*node.mapped());
}

uint64_t buffer_capacity(const void *buffer) {
    std::lock_guard lock(registry().mutex);
    const auto it = registry().ranges.find(reinterpret_cast<uint64_t>(buffer));
    if (it == registry().ranges.end() || !it->second->pool) {
        throw Error(KVF_ERR_INVALID_ARGUMENT, "not an allocated buffer");
    }
    return it->second->bytes;
}

Pool::~Pool() {
    {
        std::lock_guard lock(mutex_);
        stopping_ = true;
        freed_.notify_one();
    }
    if (idle_watch_.joinable()) idle_watch_.join();
    unmap(std::move(free_));
}

void *Pool::alloc(uint64_t bytes) {
    if (bytes == 0) throw Error(KVF_ERR_INVALID_ARGUMENT, "bytes is 0");
    if (bytes >= (uint64_t{1} << 46)) throw Error(KVF_ERR_OUT_OF_MEMORY, "no machine has so much");
    // Sizes in steps of a sixteenth at most, so that buffers of nearly the same size serve each other.
    uint64_t step = page_size();
    while (step < bytes / 32) step *= 2;
    uint64_t size = round_up(bytes, step);
    // Where bytes are limited none are given away: what a buffer takes depends on its size alone. Else a larger one
    // that is free serves too, and saves the time to map another.
    const uint64_t most = limit_ ? size : size + size / 4;

    auto known = std::make_shared<KnownMemory>();
    void *memory = nullptr;
    {
        std::lock_guard lock(mutex_);
        auto it = free_.lower_bound(size);
        if (it != free_.end() && it->first <= most) {
            memory = it->second.memory;
            known->bytes = it->first;
            free_bytes_ -= it->first;
            free_.erase(it);
        }
    }
    if (!memory) {
        memory = map(size, round_up(bytes, page_size()));
        known->bytes = size;
    }
    known->begin = reinterpret_cast<uint64_t>(memory);
    known->pinned = pinner_ != nullptr;
    known->pool = shared_from_this();
    std::lock_guard lock(registry().mutex);
    registry().ranges.emplace(known->begin, known);
    return memory;
}

void Pool::take_back(KnownMemory &memory) {
    std::lock_guard lock(mutex_);
    if (memory.lost.load(std::memory_order_relaxed)) {
        lost_ += memory.bytes; // nobody else shall have it
        return;
    }
    free_.emplace(memory.bytes, Free{reinterpret_cast<void *>(memory.begin), now_ns()});
    free_bytes_ += memory.bytes;
    try {
        if (!idle_watch_.joinable()) idle_watch_ = start_thread([this] { watch_idle(); });
    } catch (const std::system_error &) {
        // Without a thread it stays until somebody wants it or trims.
    }
    freed_.notify_one();
}

void Pool::watch_idle() {
    name_thread("kvf-pool");
    std::unique_lock lock(mutex_);
    for (;;) {
        freed_.wait(lock, [this] { return stopping_ || !free_.empty(); });
        if (stopping_) return;
        uint64_t oldest = UINT64_MAX;
        for (const auto &[bytes, free] : free_) oldest = std::min(oldest, free.freed_ns);
        const uint64_t now = now_ns();
        if (now < oldest + idle_ns()) {
            // Whatever is freed meanwhile is not older.
            freed_.wait_for(lock, std::chrono::nanoseconds(oldest + idle_ns() - now),
                            [this] { return stopping_; });
            continue;
        }
        lock.unlock();
        trim(now - idle_ns() + 1);
        lock.lock();
    }
}

// Where the system has no more, what lies idle is given back to it first.
void *Pool::map(uint64_t &bytes, uint64_t least) {
    try {
        return map_pinned(bytes, least);
    } catch (const Error &error) {
        if (error.status != KVF_ERR_OUT_OF_MEMORY || !trim(UINT64_MAX)) throw;
    }
    return map_pinned(bytes, least);
}

void *Pool::map_pinned(uint64_t &bytes, uint64_t least) {
    FreeBuffers room; // goes without the lock
    uint64_t taken;
    bool fits;
    {
        std::lock_guard lock(mutex_);
        // Free buffers of other sizes make room first.
        while (limit_ && mapped_ + bytes > limit_ && !free_.empty()) {
            auto node = free_.extract(std::prev(free_.end()));
            mapped_ -= node.key();
            free_bytes_ -= node.key();
            room.insert(std::move(node));
        }
        if (limit_ && mapped_ + bytes > limit_) bytes = least; // rounding is no reason to refuse
        taken = mapped_;
        fits = !limit_ || mapped_ + bytes <= limit_;
        if (fits) mapped_ += bytes;
    }
    unmap(std::move(room));
    if (!fits) {
        throw Error(KVF_ERR_PINNED_LIMIT, text_of_bytes(taken) + " of " + text_of_bytes(limit_) +
                                              " taken, " + text_of_bytes(bytes) + " wanted");
    }
    const auto give_up = [&](int32_t status, std::string why) {
        std::lock_guard lock(mutex_);
        mapped_ -= bytes;
        throw Error(status, std::move(why));
    };
    const AvailableMemory available = limits_.available();
    // What is pinned is taken, all of it. Beyond a control group's limit the system kills processes; beyond the machine's
    // memory it swaps first.
    if (pinner_ && bytes > available.group) {
        give_up(KVF_ERR_OUT_OF_MEMORY, text_of_bytes(available.group_limit - available.group) +
                                           " of the control group's " +
                                           text_of_bytes(available.group_limit) + " taken, " +
                                           text_of_bytes(bytes) + " wanted");
    }
    // Large buffers start at a huge page: fewer faults, and fewer pages to pin.
    const uint64_t slack = bytes >= kHugePage ? kHugePage : 0;
    void *mapped =
        mmap(nullptr, bytes + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) give_up(KVF_ERR_OUT_OF_MEMORY, format("mmap: %s", strerror(errno)));
    auto *begin = static_cast<char *>(mapped);
    if (slack) {
        auto *aligned =
            reinterpret_cast<char *>(round_up(reinterpret_cast<uint64_t>(begin), slack));
        if (aligned > begin) munmap(begin, static_cast<size_t>(aligned - begin));
        char *end = begin + bytes + slack;
        if (end > aligned + bytes)
            munmap(aligned + bytes, static_cast<size_t>(end - aligned - bytes));
        begin = aligned;
        madvise(begin, bytes, MADV_HUGEPAGE); // a wish: without it everything works the same
    }
    // A forked child has no use for pinned pages, and copying them on write would take them away from
    // the parent's devices.
    if (pinner_) madvise(begin, bytes, MADV_DONTFORK);
    populate(begin, bytes, available);
    if (pinner_) {
        try {
            pinner_->pin(begin, bytes);
        } catch (const Error &error) {
            munmap(begin, bytes);
            give_up(error.status, error.detail);
        }
    }
    return begin;
}

// Takes its time (the driver's, to unpin): not under the lock.
void Pool::unmap(FreeBuffers &&buffers) noexcept {
    for (auto &[bytes, free] : buffers) {
        if (!pinner_ || pinner_->unpin(free.memory, bytes)) {
            munmap(free.memory, bytes);
            continue;
        }
        std::lock_guard lock(mutex_);
        mapped_ += bytes;
        lost_ += bytes;
    }
    buffers.clear();
}

bool Pool::trim(uint64_t freed_before_ns) {
    FreeBuffers old;
    {
        std::lock_guard lock(mutex_);
        for (auto it = free_.begin(); it != free_.end();) {
            const auto at = it++;
            if (at->second.freed_ns >= freed_before_ns) continue;
            mapped_ -= at->first;
            free_bytes_ -= at->first;
            old.insert(free_.extract(at));
        }
    }
    const bool any = !old.empty();
    unmap(std::move(old));
    return any;
}

Pool::Usage Pool::usage() const {
    std::lock_guard lock(mutex_);
    return {limit_, mapped_, free_bytes_, lost_};
}

bool WritableCheck::operator()(uint64_t address, uint64_t bytes) {
    if (bytes == 0) return true;
    return is_writable(address) && is_writable(address + bytes - 1);
}

bool WritableCheck::is_writable(uint64_t address) {
    if (address >= last_begin_ && address < last_end_) return true;
    if (!is_page_writable(address)) return false;
    last_begin_ = address / page_size() * page_size();
    last_end_ = last_begin_ + page_size();
    return true;
}

bool MappedCheck::operator()(uint64_t address, uint64_t bytes) {
    const uint64_t page = page_size();
    const uint64_t first = address / page * page;
    const uint64_t last = (address + bytes - 1) / page * page;
    const auto is_known = [this](uint64_t at) { return at >= known_begin_ && at < known_end_; };
    if (is_known(first) && is_known(last)) return true;
    {
        // What the library has mapped or pinned itself needs no system call.
        std::lock_guard lock(registry().mutex);
        if (registry().holding(address, bytes)) return true;
    }
    return is_accessible(first) && is_accessible(last);
}

bool MappedCheck::is_accessible(uint64_t page) {
    if (page >= known_begin_ && page < known_end_) return true;
    if (++questions_ == kManyQuestions) read_mappings();
    if (is_in_mappings(page)) return true;
    if (!is_readable(page)) return false;
    known_begin_ = page;
    known_end_ = page + page_size();
    return true;
}

// Only anonymous memory: a page of a file that lies beyond the file's end cannot be read, and the list does not tell.
void MappedCheck::read_mappings() {
    std::ifstream file("/proc/self/maps");
    for (std::string line; std::getline(file, line);) {
        unsigned long long begin, end, inode;
        char readable;
        if (std::sscanf(line.c_str(), "%llx-%llx %c%*s %*s %*s %llu", &begin, &end, &readable,
                        &inode) == 4 &&
            readable == 'r' && inode == 0) {
            mappings_.emplace(begin, end);
        }
    }
}

bool MappedCheck::is_in_mappings(uint64_t page) {
    auto it = mappings_.upper_bound(page);
    if (it == mappings_.begin() || page >= (--it)->second) return false;
    known_begin_ = it->first;
    known_end_ = it->second;
    return true;
}

} // namespace kvf
