// Which leg of a device moves next: urgent jobs before background ones; of equal priority, the
// oldest leg that can move.
#pragma once

#include <array>

#include "jobs/job.h"

namespace kvf {

// A few gates that are asked together, without the schedule's lock.
class GateCheck {
public:
    static constexpr size_t kMost = 16;

    void run() {
        for (size_t i = 0; i < count_; ++i) {
            entries_[i].is_open = entries_[i].gate->is_open();
            // Its job may have ended. Then the gate is destroyed here, and not under the lock.
            entries_[i].gate.reset();
        }
    }

private:
    friend class Schedule;

    struct Entry {
        uint64_t order = 0; // of the leg
        std::shared_ptr<Gate> gate;
        bool is_open = false;
    };
    std::array<Entry, kMost> entries_;
    size_t count_ = 0;
};

// Not locked: LockedSchedule is. Only add() allocates memory, so that a leg in the schedule can be
// moved and ended whatever happens. Nothing here asks a driver, which would take its time under the
// lock.
class Schedule {
public:
    // The leg stays the job's. The schedule forgets the leg when all of it has been taken, or when
    // it was cut short.
    void add(Leg &leg) {
        const auto &gate = leg.job->gate();
        LegList &list = gate && !gate->was_open() ? lists_of(leg).following : list_of_moving(leg);
        leg.position = list.emplace_hint(list.end(), next_order_, &leg);
        leg.list = &list;
        ++next_order_;
    }

    bool empty() const { return lists_[0].empty() && lists_[1].empty(); }

    // Returns the oldest leg that can move; NULL if there is none. Legs that still follow a stream,
    // or whose next part has not been recorded yet, let younger legs pass; and so do those for
    // which `waits` returns true.
    Leg *front(uint32_t priority) {
        return front(priority, [](const Leg &) { return false; });
    }
    template <class Function>
    Leg *front(uint32_t priority, Function &&waits) {
        for (const auto &[order, leg] : lists_[priority].ready) {
            if (!waits(*leg)) return leg;
        }
        return nullptr;
    }

    // Lets `take_pieces` take pieces from the parts of a leg that front() returned. All that it
    // takes counts as one piece, for which piece_ended() is called once.
    template <class Function>
    void take(Leg &leg, Function &&take_pieces) {
        take_pieces();
        ++leg.in_flight;
        if (leg.parts.at_end()) {
            leave(leg);
        } else if (leg.parts.empty()) {
            move(leg, lists_of(leg).recording);
        }
    }

    // Adds a part to a leg that is not closed. False if the leg was cut short, and then its job may
    // have ended.
    bool extend(Leg &leg, Layout &&part) {
        if (leg.parts.is_closed()) return false;
        leg.parts.add(std::move(part));
        if (leg.list == &lists_of(leg).recording) move(leg, list_of_moving(leg));
        return true;
    }

    // Closes a leg. True if it has ended with this, as for piece_ended(). False for a leg that was
    // cut short.
    bool close(Leg &leg) {
        if (leg.parts.is_closed()) return false;
        leg.parts.close();
        if (!leg.parts.at_end()) return false;
        leave(leg);
        return leg.in_flight == 0;
    }

    // What take() took has moved. True if the leg has ended with this: then the caller tells the
    // job, outside the lock.
    bool piece_ended(Leg &leg) {
        --leg.in_flight;
        return leg.in_flight == 0 && leg.parts.at_end();
    }

    // ---- Legs that follow streams ----

    bool has_following(uint32_t priority) const { return !lists_[priority].following.empty(); }

    // Notes which gates to ask next: all of that priority, one after another, over several calls.
    // True if every gate has been noted since the last call that returned true.
    bool next_gates(uint32_t priority, GateCheck &check) {
        Lists &lists = lists_[priority];
        auto it = lists.following.upper_bound(lists.last_asked);
        for (; it != lists.following.end() && check.count_ < GateCheck::kMost; ++it) {
            check.entries_[check.count_++] = {it->first, it->second->job->gate(), false};
            lists.last_asked = it->first;
        }
        if (it != lists.following.end()) return false;
        lists.last_asked = 0;
        return true;
    }

    // Lets the legs move whose gates were found open, in the order in which they were added. True
    // if there is one.
    bool admit(uint32_t priority, const GateCheck &check) {
        LegList &following = lists_[priority].following;
        bool any = false;
        for (size_t i = 0; i < check.count_; ++i) {
            if (!check.entries_[i].is_open) continue;
            const auto it = following.find(check.entries_[i].order);
            if (it == following.end()) continue; // cut short meanwhile
            move(*it->second, list_of_moving(*it->second));
            any = true;
        }
        return any;
    }

    // ---- Legs whose job is stopping ----

    // No more of the leg is taken. True if the leg has ended with this, as for piece_ended(). Does
    // nothing with a leg that is not in the schedule: it has not been added yet, or all of it has
    // been taken. Looks at no other leg.
    bool cut_short(Leg &leg) {
        if (!leg.list) return false;
        leg.parts.cut_short();
        leave(leg);
        return leg.in_flight == 0;
    }

    // cut_short() for every leg whose job is stopping. Legs that have ended with this are moved to
    // `ended`.
    void cut_short_stopping(LegList &ended) {
        for_each([&](Leg &leg) {
            if (!leg.job->stopping()) return;
            leg.parts.cut_short();
            if (leg.in_flight == 0) {
                move(leg, ended);
                leg.list = nullptr;
            } else {
                leave(leg);
            }
        });
    }

    // The function may take the leg out.
    template <class Function>
    void for_each(Function &&function) {
        for (Lists &lists : lists_) {
            for (LegList *list : {&lists.ready, &lists.recording, &lists.following}) {
                for (auto it = list->begin(); it != list->end();) function(*(it++)->second);
            }
        }
    }

private:
    struct Lists {
        LegList ready;
        LegList recording; // cannot move until more is recorded
        LegList following; // their streams were at work when they were last asked
        uint64_t last_asked = 0;

        bool empty() const { return ready.empty() && recording.empty() && following.empty(); }
    };

    Lists &lists_of(const Leg &leg) { return lists_[leg.job->request.priority]; }
    // Of a leg that follows nothing any more.
    LegList &list_of_moving(const Leg &leg) {
        return leg.parts.empty() ? lists_of(leg).recording : lists_of(leg).ready;
    }

    static void move(Leg &leg, LegList &list) {
        leg.position = list.insert(leg.list->extract(leg.position)).position;
        leg.list = &list;
    }
    static void leave(Leg &leg) {
        leg.list->erase(leg.position);
        leg.list = nullptr;
    }

    std::array<Lists, 2> lists_; // by priority
    uint64_t next_order_ = 1;
};

} // namespace kvf
