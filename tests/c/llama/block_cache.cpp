// libllama's large blocks: whoever frees one names the size that it asked for, so that is the size
// of what it is given.
#include "llama/block_cache.h"

#include "check.hpp"

using kvf::BlockCache;

namespace {

constexpr size_t kBlock = 1 << 20;

void keep(BlockCache &blocks, size_t bytes) { CHECK(blocks.keep(::operator new(bytes), bytes)); }

void gives_a_block_of_the_very_size_only() {
    BlockCache blocks;
    keep(blocks, kBlock);
    CHECK(!blocks.take(kBlock - 1));
    CHECK(!blocks.take(kBlock + 1));
    void *const memory = blocks.take(kBlock);
    CHECK(memory);
    CHECK(!blocks.take(kBlock)); // it is given once
    ::operator delete(memory, kBlock);
}

// Else sizes that nobody asks for any more would fill it for ever.
void keeps_the_latest_where_there_is_no_room_for_all() {
    BlockCache blocks;
    const size_t count = BlockCache::kMostBytes / kBlock;
    for (size_t i = 0; i < count + 2; ++i) keep(blocks, kBlock + i);
    CHECK(!blocks.take(kBlock));
    CHECK(!blocks.take(kBlock + 1));
    void *const latest = blocks.take(kBlock + count + 1);
    CHECK(latest);
    ::operator delete(latest, kBlock + count + 1);
}

void wants_no_block_that_is_larger_than_all_of_it() {
    BlockCache blocks;
    keep(blocks, kBlock);
    void *const memory = ::operator new(BlockCache::kMostBytes + 1);
    CHECK(!blocks.keep(memory, BlockCache::kMostBytes + 1));
    ::operator delete(memory, BlockCache::kMostBytes + 1);
    void *const kept = blocks.take(kBlock);
    CHECK(kept);
    ::operator delete(kept, kBlock);
}

} // namespace

int main() {
    gives_a_block_of_the_very_size_only();
    keeps_the_latest_where_there_is_no_room_for_all();
    wants_no_block_that_is_larger_than_all_of_it();
    return 0;
}
