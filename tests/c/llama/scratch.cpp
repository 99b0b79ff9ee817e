// Scratch states of one context use the same pages, but not for ever.
#include "llama/scratch.h"

#include <sys/resource.h>

#include "check.hpp"

using kvf::BorrowedScratch;
using kvf::ScratchCache;

namespace {

constexpr uint64_t kPage = 4096;

void the_next_one_has_the_same_pages() {
    ScratchCache cache;
    {
        BorrowedScratch(cache, 4 * kPage).data[kPage] = 7;
    }
    const BorrowedScratch smaller(cache, 2 * kPage);
    CHECK(smaller.bytes() == 4 * kPage && smaller.data[kPage] == 7);
    // Two at a time do not share.
    const BorrowedScratch other(cache, 4 * kPage);
    CHECK(other.data != smaller.data && other.data[kPage] == 0);
}

void a_larger_one_is_mapped_anew() {
    ScratchCache cache;
    {
        BorrowedScratch(cache, kPage).data[0] = 7;
    }
    const BorrowedScratch larger(cache, 8 * kPage);
    CHECK(larger.bytes() == 8 * kPage && larger.data[0] == 0);
}

void pages_are_returned_after_some_uses() {
    ScratchCache cache;
    for (uint32_t use = 0; use < 3 * ScratchCache::kMostUses; ++use) {
        const BorrowedScratch scratch(cache, 64 * kPage);
        unsigned char *const page = scratch.data + use % 64 * kPage;
        CHECK(*page == 0);
        *page = 1;
        int touched = 0;
        for (uint64_t i = 0; i < 64; ++i) touched += scratch.data[i * kPage];
        CHECK(touched <= static_cast<int>(ScratchCache::kMostUses));
    }
}

void nothing_is_kept_of_a_limited_address_space() {
    ScratchCache cache;
    rlimit before{};
    CHECK(getrlimit(RLIMIT_AS, &before) == 0);
    if (before.rlim_max == RLIM_INFINITY) {
        rlimit limited = before;
        limited.rlim_cur = uint64_t{1} << 62; // room for the shadow memory of TSan
        CHECK(setrlimit(RLIMIT_AS, &limited) == 0);
        {
            BorrowedScratch(cache, kPage).data[0] = 7;
        }
        CHECK(BorrowedScratch(cache, kPage).data[0] == 0);
        CHECK(setrlimit(RLIMIT_AS, &before) == 0);
    }
}

} // namespace

int main() {
    the_next_one_has_the_same_pages();
    a_larger_one_is_mapped_anew();
    pages_are_returned_after_some_uses();
    nothing_is_kept_of_a_limited_address_space();
}
