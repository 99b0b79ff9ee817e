// libllama names the size of the memory that it frees. So it must be given memory of the very size
// that it asks for.
#include "llama/heap_cache.h"

#include "check.hpp"

using kvf::HeapCache;

namespace {

constexpr size_t kBytes = 1 << 20;

void keep(HeapCache &heap, size_t bytes) { CHECK(heap.keep(::operator new(bytes), bytes)); }

void gives_memory_of_the_very_size_only() {
    HeapCache heap;
    keep(heap, kBytes);
    CHECK(!heap.take(kBytes - 1));
    CHECK(!heap.take(kBytes + 1));
    void *const memory = heap.take(kBytes);
    CHECK(memory);
    CHECK(!heap.take(kBytes)); // it is given once
    ::operator delete(memory, kBytes);
}

// Else sizes that nobody asks for any more would fill it for ever.
void keeps_the_latest_where_there_is_no_room_for_all() {
    HeapCache heap;
    const size_t count = HeapCache::kMostBytes / kBytes;
    for (size_t i = 0; i < count + 2; ++i) keep(heap, kBytes + i);
    CHECK(!heap.take(kBytes));
    CHECK(!heap.take(kBytes + 1));
    void *const latest = heap.take(kBytes + count + 1);
    CHECK(latest);
    ::operator delete(latest, kBytes + count + 1);
}

void refuses_memory_that_is_larger_than_all_of_it() {
    HeapCache heap;
    keep(heap, kBytes);
    void *const memory = ::operator new(HeapCache::kMostBytes + 1);
    CHECK(!heap.keep(memory, HeapCache::kMostBytes + 1));
    ::operator delete(memory, HeapCache::kMostBytes + 1);
    void *const kept = heap.take(kBytes);
    CHECK(kept);
    ::operator delete(kept, kBytes);
}

} // namespace

int main() {
    gives_memory_of_the_very_size_only();
    keeps_the_latest_where_there_is_no_room_for_all();
    refuses_memory_that_is_larger_than_all_of_it();
    return 0;
}
