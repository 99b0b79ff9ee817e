// Who waits at a fence, and for how long: writers for every transfer, readers for loads.
#include "jobs/fences.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>

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
    fence.raise({{100, 200}, {300, 400}});
    CHECK(Fence::any());
    CHECK(Fence::extent().begin == 100 && Fence::extent().end == 400);
    for (const MemoryRange range : {MemoryRange{0, 100}, {200, 300}, {400, 500}, {250, 260}})
        passes(range, Access::Write);
    for (const MemoryRange range : {MemoryRange{0, 101}, {199, 300}, {399, 400}, {0, 1000}}) {
        Fence other(Direction::Save); // far away: in nobody's way
        other.raise({{10000, 20000}});
        Fence again(Direction::Load);
        again.raise({{100, 200}, {300, 400}});
        Visitor visitor(range, Access::Write);
        CHECK(visitor.waits());
        fence.lower();
        CHECK(visitor.waits());
        again.lower();
        visitor.join();
        fence.raise({{100, 200}, {300, 400}});
    }
}

void readers_wait_for_loads_alone() {
    Fence save(Direction::Save);
    save.raise({{100, 200}});
    passes({100, 200}, Access::Read);
    Fence load(Direction::Load);
    load.raise({{150, 200}});
    passes({100, 150}, Access::Read);
    Visitor reader({100, 200}, Access::Read);
    CHECK(reader.waits());
    load.lower();
    reader.join();
}

void decoding_waits_at_close_ones_alone() {
    Fence fence(Direction::Load);
    fence.raise({{100, 200}});
    passes({100, 200}, Access::WriteRows);
    CHECK(!Fence::any_close());
    Fence close(Direction::Load);
    close.raise({{100, 200}}, true);
    CHECK(Fence::any_close());
    Visitor decoding({150, 160}, Access::WriteRows);
    CHECK(decoding.waits());
    close.lower();
    decoding.join();
    CHECK(Fence::any() && !Fence::any_close());
}

void one_that_goes_lowers_itself() {
    {
        Fence fence(Direction::Load);
        fence.raise({{1, 2}});
        CHECK(Fence::any());
    }
    CHECK(!Fence::any());
    Fence never(Direction::Load);
    never.raise({}); // nothing to guard
    CHECK(!Fence::any());
    never.lower();
}

// Threads that wait at the fork are not there in the child.
void in_a_forked_child_nobody_waits_for_the_parents() {
    Fence parents(Direction::Load);
    parents.raise({{100, 200}});
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
            own.raise({{100, 200}});
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
    one_that_goes_lowers_itself();
    in_a_forked_child_nobody_waits_for_the_parents();
}
