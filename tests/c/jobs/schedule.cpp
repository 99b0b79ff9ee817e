// Which leg of a device moves next, and what it costs to take one out.
#include "jobs/schedule.h"

#include <deque>

#include "check.hpp"
#include "memory/layout_builder.h"

using kvf::Direction;
using kvf::GateCheck;
using kvf::Leg;
using kvf::Schedule;

namespace {

constexpr uint32_t kBackground = KVF_PRIORITY_BACKGROUND, kUrgent = KVF_PRIORITY_URGENT;

class TestGate final : public kvf::Gate {
public:
    bool done = false;
    int asked = 0;

private:
    bool is_done() override {
        ++asked;
        return done;
    }
};

kvf::Layout runs(uint64_t count) {
    kvf::LayoutBuilder builder;
    for (uint64_t i = 0; i < count; ++i) builder.add(i << 20, i * kvf::kLongRun, kvf::kLongRun);
    return builder.finish();
}

// A job needs an owner, and a leg a device. Neither matters here.
class TestOwner final : public kvf::JobOwner {
    void cut_short_stopping() override {}
    void make_stream_wait(uint64_t, kvf::Job &) override {}
    void dispatch(kvf::Callbacks &&) override {}
    void job_ended(kvf::Job &) override {}
    void trace(const kvf::Job &, uint64_t, uint64_t, uint64_t, uint32_t) override {}
};

class TestDevice final : public kvf::Device {
public:
    TestDevice() : Device(kHost) {}

private:
    std::string describe() const override { return "{}"; }
    void submit(Leg &) override {}
    void extend(Leg &, kvf::Layout &&) override {}
    void close(Leg &) override {}
    void cut_short(Leg &) override {}
    void cut_short_stopping() override {}
    Snapshot snapshot(const kvf::Layout &, unsigned char *) override { return {}; }
    void stop() override {}
};

// Jobs of one leg each, and the schedule that these stand in.
class Test {
public:
    Schedule schedule;

    Leg &add(uint32_t priority, uint64_t pieces, std::shared_ptr<kvf::Gate> gate = nullptr) {
        Leg &leg = open(priority, pieces, std::move(gate));
        leg.parts.close();
        return leg;
    }
    // More of it may come.
    Leg &open(uint32_t priority, uint64_t pieces, std::shared_ptr<kvf::Gate> gate = nullptr) {
        kvf::JobRequest request;
        request.priority = priority;
        kvf::JobResources resources;
        resources.gate = std::move(gate);
        const auto job = std::make_shared<kvf::Job>(&owner_, request, std::move(resources));
        Leg &leg = legs_.emplace_back(device_, Direction::Save);
        leg.job = job;
        leg.parts.add(runs(pieces));
        schedule.add(leg);
        return leg;
    }
    // The leg that the next piece is taken of; NULL if there is none.
    Leg *take(uint32_t priority) {
        Leg *leg = schedule.front(priority);
        if (leg) schedule.take(*leg, [&] { leg->parts.next(kvf::kLongRun, 1); });
        return leg;
    }
    bool ask(uint32_t priority) {
        GateCheck check;
        const bool all = schedule.next_gates(priority, check);
        check.run();
        schedule.admit(priority, check);
        return all;
    }

private:
    TestOwner owner_;
    TestDevice device_;
    std::deque<Leg> legs_;
};

void the_oldest_goes_first() {
    Test test;
    Leg &first = test.add(kBackground, 3), &second = test.add(kBackground, 2);
    Leg &urgent = test.add(kUrgent, 1);
    for (int i = 0; i < 3; ++i) CHECK(test.take(kBackground) == &first);
    for (int i = 0; i < 2; ++i) CHECK(test.take(kBackground) == &second);
    CHECK(!test.take(kBackground));
    CHECK(test.take(kUrgent) == &urgent);
    CHECK(test.schedule.empty());
    CHECK(!test.schedule.piece_ended(second)); // two of its pieces are under way
    CHECK(test.schedule.piece_ended(second));
}

void one_that_is_being_recorded_lets_others_pass_and_keeps_its_place() {
    Test test;
    Leg &first = test.open(kBackground, 1), &second = test.add(kBackground, 3);
    CHECK(test.take(kBackground) == &first);
    CHECK(test.take(kBackground) == &second);
    CHECK(test.schedule.extend(first, runs(2)));
    for (int i = 0; i < 2; ++i) CHECK(test.take(kBackground) == &first);
    CHECK(test.take(kBackground) == &second);
    CHECK(!test.schedule.close(first)); // pieces are under way
    for (int i = 0; i < 2; ++i) CHECK(!test.schedule.piece_ended(first));
    CHECK(test.schedule.piece_ended(first));
    CHECK(!test.schedule.extend(first, runs(1)));
    CHECK(test.take(kBackground) == &second);
    CHECK(test.schedule.empty());
}

void one_that_waits_by_choice_lets_others_pass() {
    Test test;
    Leg &first = test.add(kUrgent, 1), &second = test.add(kUrgent, 1);
    const auto is_first = [&](const Leg &leg) { return &leg == &first; };
    CHECK(test.schedule.front(kUrgent, is_first) == &second);
    CHECK(!test.schedule.front(kUrgent, [](const Leg &) { return true; }));
    CHECK(test.schedule.front(kUrgent) == &first);
}

void one_that_follows_a_stream_lets_others_pass_and_keeps_its_place() {
    Test test;
    const auto gate = std::make_shared<TestGate>();
    Leg &first = test.add(kBackground, 2, gate), &second = test.add(kBackground, 2);
    CHECK(test.take(kBackground) == &second);
    CHECK(test.ask(kBackground) && gate->asked == 1);
    CHECK(test.schedule.front(kBackground) == &second);
    gate->done = true;
    CHECK(test.schedule.front(kBackground) == &second); // nobody has asked
    CHECK(test.ask(kBackground));
    for (int i = 0; i < 2; ++i) CHECK(test.take(kBackground) == &first);
    CHECK(test.take(kBackground) == &second);
    // It is known for the next leg behind it.
    Leg &third = test.add(kBackground, 1, gate);
    CHECK(test.take(kBackground) == &third);
    CHECK(gate->asked == 2);
}

// What is done under a device's lock asks no gate; and asked is every one, in its turn.
void gates_are_asked_a_few_at_a_time() {
    constexpr size_t kLegs = 5 * GateCheck::kMost + 1;
    Test test;
    std::vector<std::shared_ptr<TestGate>> gates;
    std::vector<Leg *> legs;
    for (size_t i = 0; i < kLegs; ++i) {
        gates.push_back(std::make_shared<TestGate>());
        legs.push_back(&test.add(kUrgent, 1, gates.back()));
        CHECK(!test.schedule.front(kUrgent));
    }
    for (const auto &gate : gates) CHECK(gate->asked == 0);
    for (int round = 1; round < 4; ++round) {
        for (int i = 0; i < 5; ++i) CHECK(!test.ask(kUrgent));
        CHECK(test.ask(kUrgent));
        for (const auto &gate : gates) CHECK(gate->asked == round);
    }
    CHECK(test.ask(kBackground)); // there are none

    // Some leave between two calls.
    CHECK(!test.ask(kUrgent));
    for (size_t i = 0; i < kLegs; i += 2) CHECK(test.schedule.cut_short(*legs[i]));
    while (!test.ask(kUrgent)) {
    }
    for (size_t i = 1; i < kLegs; i += 2) {
        CHECK(gates[i]->asked == 4);
        gates[i]->done = true;
    }
    while (!test.ask(kUrgent)) {
    }
    for (size_t i = 1; i < kLegs; i += 2) CHECK(test.take(kUrgent) == legs[i]);
    CHECK(test.schedule.empty());
}

// A gate is asked without the lock: its leg may go meanwhile. Then the gate goes before the lock is
// taken again, for that calls the driver.
void one_may_be_cut_short_while_its_gate_is_asked() {
    Test test;
    auto gate = std::make_shared<TestGate>(), others = std::make_shared<TestGate>();
    gate->done = others->done = true;
    const std::weak_ptr<TestGate> gone = gate;
    Leg &leg = test.add(kBackground, 1, std::move(gate));
    Leg &other = test.add(kBackground, 1, std::move(others));
    GateCheck check;
    CHECK(test.schedule.next_gates(kBackground, check));
    CHECK(test.schedule.cut_short(leg));
    leg.job->end_work(); // the job ends, and releases its gate
    CHECK(!gone.expired());
    check.run();
    CHECK(gone.expired());
    CHECK(test.schedule.admit(kBackground, check));
    CHECK(test.take(kBackground) == &other);
    CHECK(test.schedule.empty());
}

void cutting_short_looks_at_no_other_leg() {
    Test test;
    const auto gate = std::make_shared<TestGate>();
    std::vector<Leg *> others;
    const auto add_others = [&] {
        for (int i = 0; i < 100; ++i) {
            for (const uint32_t priority : {kBackground, kUrgent}) {
                others.push_back(&test.add(priority, 1));
                others.push_back(&test.add(priority, 1, gate));
            }
        }
    };
    add_others();
    Leg &ready = test.add(kBackground, 1), &follows = test.add(kBackground, 1, gate);
    Leg &moves = test.open(kBackground, 1);
    add_others();
    // Whoever looks at one of these now, crashes.
    std::vector<std::shared_ptr<kvf::Job>> jobs;
    for (Leg *other : others) jobs.push_back(std::move(other->job));

    CHECK(test.schedule.cut_short(ready));
    CHECK(!test.schedule.cut_short(ready)); // it has ended
    CHECK(test.schedule.cut_short(follows));
    test.schedule.take(moves, [&] { moves.parts.next(kvf::kLongRun, 1); });
    CHECK(!test.schedule.cut_short(moves)); // its piece is under way
    CHECK(test.schedule.piece_ended(moves));

    for (size_t i = 0; i < others.size(); ++i) others[i]->job = jobs[i];
    int left = 0;
    test.schedule.for_each([&](Leg &) { ++left; });
    CHECK(left == 800);
}

void sweeping_ends_those_that_are_stopping() {
    Test test;
    Leg &first = test.add(kBackground, 2), &second = test.add(kUrgent, 1);
    Leg &third = test.add(kUrgent, 2, std::make_shared<TestGate>());
    CHECK(test.take(kBackground) == &first);
    first.job->cancel();
    third.job->cancel();
    kvf::LegList ended;
    test.schedule.cut_short_stopping(ended);
    CHECK(ended.size() == 1 && ended.begin()->second == &third);
    CHECK(test.schedule.piece_ended(first));
    CHECK(test.take(kUrgent) == &second);
    CHECK(test.schedule.empty());
    CHECK(!test.schedule.cut_short(third));
}

} // namespace

int main() {
    the_oldest_goes_first();
    one_that_is_being_recorded_lets_others_pass_and_keeps_its_place();
    one_that_waits_by_choice_lets_others_pass();
    one_that_follows_a_stream_lets_others_pass_and_keeps_its_place();
    gates_are_asked_a_few_at_a_time();
    one_may_be_cut_short_while_its_gate_is_asked();
    cutting_short_looks_at_no_other_leg();
    sweeping_ends_those_that_are_stopping();
    return 0;
}
