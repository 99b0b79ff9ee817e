#include "allocations.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "operations.h"

namespace simulated {
namespace {

constexpr uint64_t kPage = 4096;

uint64_t pages(uint64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

[[noreturn]] void fail(const char *what) {
    std::perror(what);
    std::abort();
}

// Frees the pages. They read as zero if they are allocated again.
void discard(const Allocation &allocation) {
    Arena &arena = *arena_of(allocation.range.address);
    fallocate(arena.file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
              static_cast<off_t>(allocation.range.address - arena.address),
              static_cast<off_t>(pages(allocation.range.bytes)));
}

void release_device(const Allocation &allocation) {
    arena_of(allocation.range.address)->allocated -= allocation.range.bytes;
    driver().counters.device_bytes -= allocation.range.bytes;
    --driver().counters.live_device_allocations;
    discard(allocation);
}

} // namespace

Arena *arena_of(uint64_t address) {
    for (Arena &arena : driver().arenas)
        if (arena.bytes && address - arena.address < arena.bytes) return &arena;
    return nullptr;
}

void open_arena(int device) {
    Arena &arena = driver().arenas[static_cast<size_t>(device)];
    if (arena.bytes) return;
    const uint64_t bytes = pages(driver().settings.device_bytes);
    arena.file = memfd_create("simulated_cuda", MFD_CLOEXEC);
    if (arena.file < 0 || ftruncate(arena.file, static_cast<off_t>(bytes)) != 0)
        fail("simulated_cuda: memfd_create");
    void *shown =
        mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    void *alias =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, arena.file, 0);
    if (shown == MAP_FAILED || alias == MAP_FAILED) fail("simulated_cuda: mmap");
    madvise(alias, bytes, MADV_DONTDUMP);
    arena.address = reinterpret_cast<uint64_t>(shown);
    arena.alias = static_cast<std::byte *>(alias);
    arena.next = arena.address;
    arena.bytes = bytes; // last, since this says that the arena is open
}

std::byte *alias_of(uint64_t address) {
    const Arena *arena = arena_of(address);
    return arena ? arena->alias + (address - arena->address) : nullptr;
}

const Allocation *allocation_of(uint64_t address) {
    auto it = driver().allocations.upper_bound(address);
    if (it == driver().allocations.begin()) return nullptr;
    const Allocation &allocation = std::prev(it)->second;
    return allocation.range.holds(address, 1) ? &allocation : nullptr;
}

CUresult allocate_device(const ContextPtr &context, uint64_t bytes, uint64_t *address) {
    Driver &d = driver();
    Arena &arena = d.arenas[static_cast<size_t>(context->device)];
    if (bytes > arena.bytes || bytes > d.settings.device_limit ||
        arena.allocated > d.settings.device_limit - bytes)
        return CUDA_ERROR_OUT_OF_MEMORY;

    // The first gap with room for the allocation and its guard pages: from `next` on, or else from
    // the start.
    const uint64_t guard = d.settings.guard_pages * kPage;
    const uint64_t need = pages(bytes) + guard;
    const auto search = [&](uint64_t from) -> uint64_t {
        uint64_t at = from;
        for (auto it = d.allocations.lower_bound(arena.address); it != d.allocations.end(); ++it) {
            const Range &range = it->second.range;
            if (range.address >= arena.address + arena.bytes) break;
            const uint64_t end = range.address + pages(range.bytes) + guard;
            if (end <= at) continue;
            if (range.address >= at && range.address - at >= need) break;
            at = end;
        }
        return at + need <= arena.address + arena.bytes ? at : 0;
    };
    uint64_t found = search(arena.next);
    if (!found) found = search(arena.address);
    if (!found) return CUDA_ERROR_OUT_OF_MEMORY;

    arena.next = found + need;
    arena.allocated += bytes;
    d.allocations[found] = {{found, bytes}, context, d.next_allocation_id++, true, false, false};
    ++d.counters.live_device_allocations;
    d.counters.device_bytes += bytes;
    d.counters.peak_device_bytes = std::max(d.counters.peak_device_bytes, d.counters.device_bytes);
    *address = found;
    return CUDA_SUCCESS;
}

CUresult pin(const ContextPtr &context, Range range, bool registered) {
    Driver &d = driver();
    if (range.bytes > d.settings.pinned_limit ||
        d.counters.pinned_bytes > d.settings.pinned_limit - range.bytes)
        return CUDA_ERROR_OUT_OF_MEMORY;
    auto next = d.allocations.lower_bound(range.address);
    if ((next != d.allocations.end() && next->second.range.meets(range)) ||
        (next != d.allocations.begin() && std::prev(next)->second.range.meets(range)))
        return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
    d.allocations[range.address] = {range, context,    d.next_allocation_id++,
                                    false, registered, false};
    ++(registered ? d.counters.live_registrations : d.counters.live_host_allocations);
    d.counters.pinned_bytes += range.bytes;
    d.counters.peak_pinned_bytes = std::max(d.counters.peak_pinned_bytes, d.counters.pinned_bytes);
    return CUDA_SUCCESS;
}

void free_in_order(uint64_t address) {
    Driver &d = driver();
    const Allocation allocation = d.allocations.at(address);
    if (is_used(allocation.range)) ++d.counters.hazards;
    d.allocations.erase(address);
    release_device(allocation);
}

void release_allocation(Lock &lock, uint64_t address, bool abandoned) {
    Driver &d = driver();
    const Allocation allocation = d.allocations.at(address);
    if (abandoned)
        ++d.counters.abandoned;
    else if (is_used(allocation.range))
        ++d.counters.hazards;
    wait_for_uses(lock, allocation.range,
                  allocation.on_device ? allocation.context.get() : nullptr);
    if (d.allocations.erase(address) == 0) return; // another thread has freed it

    if (allocation.on_device) {
        release_device(allocation);
    } else {
        d.counters.pinned_bytes -= allocation.range.bytes;
        --(allocation.registered ? d.counters.live_registrations
                                 : d.counters.live_host_allocations);
        if (!allocation.registered) std::free(reinterpret_cast<void *>(address));
    }
}

bool is_mapped(Range range) {
    // mincore() writes one byte for each page. Only its error matters.
    unsigned char residency[4096];
    uint64_t at = range.address / kPage * kPage;
    while (at < range.end()) {
        const uint64_t step = std::min<uint64_t>(pages(range.end() - at), sizeof residency * kPage);
        if (mincore(reinterpret_cast<void *>(at), step, residency) != 0) return false;
        at += step;
    }
    return true;
}

} // namespace simulated
