// A list of pinned memory beside others that share its budget: freed memory counts as free at once,
// and a refusal by the budget is not remembered.
#include "cuda/free_list.h"

#include <functional>
#include <thread>
#include <utility>
#include <vector>

#include "check.hpp"

using kvf::CudaFreeList;
using kvf::CudaPinnedBudget;

namespace {

constexpr uint64_t kMiB = 1 << 20;

std::function<void()> while_freed;

struct Item {
    explicit Item(uint64_t bytes) : bytes(bytes) {}
    ~Item() {
        if (const auto function = std::exchange(while_freed, nullptr)) function();
    }
    uint64_t pinned_bytes() const { return bytes; }

    const uint64_t bytes;
};

using List = CudaFreeList<Item>;

std::unique_ptr<Item> make(uint64_t bytes) { return std::make_unique<Item>(bytes); }

// Takes items until the budget has no more.
std::vector<std::unique_ptr<Item>> take_all(List &list) {
    std::vector<std::unique_ptr<Item>> taken;
    while (list.ensure(make)) taken.push_back(list.acquire());
    return taken;
}

void test_a_lane_gets_memory_while_its_last_item_is_freed() {
    CudaPinnedBudget budget(8 * kMiB);
    List list(budget, 7, 4 * kMiB, kMiB), other(budget, 7, 4 * kMiB, kMiB);
    CHECK(list.ensure(make));
    auto taken = take_all(other);
    bool got = false;
    while_freed = [&] { std::thread([&] { got = list.ensure(make); }).join(); };
    list.trim();
    CHECK(got);
    for (auto &item : taken) other.release(std::move(item));
}

void test_a_list_grows_when_another_has_released_its_share() {
    CudaPinnedBudget budget(3 * kMiB);
    List list(budget, 7, 4 * kMiB, kMiB), other(budget, 7, 4 * kMiB, kMiB);
    CHECK(other.ensure(make));
    CHECK(list.ensure(make));
    auto item = list.acquire();
    CHECK(!list.ensure(make)); // the other has all that the budget had
    other.trim();
    CHECK(list.ensure(make));
    list.release(std::move(item));
}

} // namespace

int main() {
    test_a_lane_gets_memory_while_its_last_item_is_freed();
    test_a_list_grows_when_another_has_released_its_share();
}
