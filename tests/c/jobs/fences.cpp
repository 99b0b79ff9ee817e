// Who waits at a fence, and for how long: writers for every transfer, readers for loads.
#include "jobs/fences.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "check.hpp"

using namespace kvf;

namespace {

// Runs the access on a thread of its own. Says whether it has passed.
class Visitor {
public:
    Visitor(MemoryRange range, Access access)
        : thread_([this, range, access] {
              Fence::wait(range, access);
              passed_ = true;
          }) {}
    ~Visitor() { thread_.join(); }

    // A fence that it should wait at would have to be slower than this to be overlooked.
    bool waits() const {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        return !passed_;
    }
    void join() {
        while (!passed_) std::this_thread::yield();
    }

private:
    std::atomic<bool> passed_{false};
    std::thread thread_;
};

void passes(MemoryRange range, Access access) { Fence::wait(range, access); }

void only_its_own_memory() {
    Fence fence(Direction::Load);
    fence.raise({.memory = {{100, 200}, {300, 400}}});
    CHECK(Fence::any());
    CHECK(Fence::extent().begin == 100 && Fence::extent().end == 400);
    for (const MemoryRange range : {MemoryRange{0, 100}, {200, 300}, {400, 500}, {250, 260}})
        passes(range, Access::Write);
    for (const MemoryRange range : {MemoryRange{0, 101}, {199, 300}, {399, 400}, {0, 1000}}) {
        Fence other(Direction::Save); // far away: in nobody's way
        other.raise({.memory = {{10000, 20000}}});
        Fence again(Direction::Load);
        again.raise({.memory = {{100, 200}, {300, 400}}});
        Visitor visitor(range, Access::Write);
        CHECK(visitor.waits());
        fence.lower();
        CHECK(visitor.waits());
        again.lower();
        visitor.join();
        fence.raise({.memory = {{100, 200}, {300, 400}}});
    }
}

void readers_wait_for_loads_alone() {
    Fence save(Direction::Save);
    save.raise({.memory = {{100, 200}}});
    passes({100, 200}, Access::Read);
    Fence load(Direction::Load);
    load.raise({.memory = {{150, 200}}});
    passes({100, 150}, Access::Read);
    Visitor reader({100, 200}, Access::Read);
    CHECK(reader.waits());
    load.lower();
    reader.join();
}

void decoding_waits_at_close_ones_alone() {
    Fence fence(Direction::Load);
    fence.raise({.memory = {{100, 200}}});
    passes({100, 200}, Access::WriteRows);
    CHECK(!Fence::any_stops_rows());
    Fence close(Direction::Load);
    close.raise({.memory = {{100, 200}}, .stops_rows = true});
    CHECK(Fence::any_stops_rows());
    Visitor decoding({150, 160}, Access::WriteRows);
    CHECK(decoding.waits());
    close.lower();
    decoding.join();
    CHECK(Fence::any() && !Fence::any_stops_rows());
}

// Runs the access with numbers of rows on a thread of its own, and says whether it waits until the
// fence is lowered.
bool waits_for(Fence &fence, MemoryRange tensor, std::vector<int64_t> numbers) {
    std::atomic<bool> passed{false};
    std::thread writer([&] {
        Fence::wait(tensor, Access::WriteRows, {numbers.data(), numbers.size()});
        passed = true;
    });
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    const bool waited = !passed;
    if (waited) fence.lower();
    writer.join();
    return waited;
}

void who_writes_a_row_that_moves_waits() {
    // Rows of 10 bytes in a tensor at 1000: the second, and the fourth and fifth.
    const Enclosure enclosure{
        .memory = {{1010, 1050}}, .rows = {{1010, 1020}, {1030, 1050}}, .row_bytes = 10};
    for (const std::vector<int64_t> &numbers : {std::vector<int64_t>{0, 2, 5}, {}, {100}}) {
        Fence fence(Direction::Load);
        fence.raise(enclosure);
        CHECK(!waits_for(fence, {1000, 2000}, numbers));
        // Another tensor's.
        CHECK(!waits_for(fence, {1040, 2000}, {0}));
        passes({1010, 1050}, Access::WriteRows);
        Fence::wait_for_rows({{1000, 1010}, {1020, 1030}, {1050, 1060}});
    }
    for (const std::vector<int64_t> &numbers : {std::vector<int64_t>{1}, {0, 3}, {5, 4}}) {
        Fence fence(Direction::Save);
        fence.raise(enclosure);
        CHECK(waits_for(fence, {1000, 2000}, numbers));
    }
}

void who_writes_waits_once_the_sequence_is_disturbed() {
    Fence fence(Direction::Save);
    bool is_disturbed = false;
    const int context = 0;
    fence.raise({.memory = {{100, 200}},
                 .is_disturbed = [&] { return is_disturbed; },
                 .context = &context});
    CHECK(!waits_for(fence, {100, 200}, {}));
    Fence::wait_for_disturbed(&context);
    is_disturbed = true;
    Fence::wait_for_disturbed(nullptr);
    CHECK(!waits_for(fence, {200, 300}, {}));
    CHECK(waits_for(fence, {100, 200}, {}));
}

void one_that_goes_lowers_itself() {
    {
        Fence fence(Direction::Load);
        fence.raise({.memory = {{1, 2}}});
        CHECK(Fence::any());
    }
    CHECK(!Fence::any());
    Fence never(Direction::Load);
    never.raise({.memory = {}}); // nothing to guard
    CHECK(!Fence::any());
    never.lower();
}

// Threads that wait at the fork are not there in the child.
void in_a_forked_child_nobody_waits_for_the_parents() {
    Fence parents(Direction::Load);
    parents.raise({.memory = {{100, 200}}});
    Visitor waiting({100, 200}, Access::Write);
    CHECK(waiting.waits());
    const pid_t child = fork();
    if (child == 0) {
        alarm(20); // else it would wait for ever
        CHECK(!Fence::any());
        passes({100, 200}, Access::Write);
#ifndef __SANITIZE_THREAD__ // TSan does not know threads of such a child
        for (int i = 0; i < 4; ++i) {
            Fence own(Direction::Load);
            own.raise({.memory = {{100, 200}}});
            Visitor visitor({100, 200}, Access::Write);
            CHECK(visitor.waits());
            own.lower();
            visitor.join();
        }
#endif
        _exit(0);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(status == 0);
    CHECK(waiting.waits());
    parents.lower();
    waiting.join();
}

} // namespace

int main() {
    only_its_own_memory();
    readers_wait_for_loads_alone();
    decoding_waits_at_close_ones_alone();
    who_writes_a_row_that_moves_waits();
    who_writes_waits_once_the_sequence_is_disturbed();
    one_that_goes_lowers_itself();
    in_a_forked_child_nobody_waits_for_the_parents();
}
