// Which piece moves next: urgent jobs before background ones; of equal priority, the oldest leg that can move. Not
// locked: the device that owns it does that. But for add(), nothing here takes memory: what has been taken in can be
// moved and ended whatever happens. Nothing here asks a driver either, which takes its time.
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
            entries_[i]
                .gate.reset(); // its job may have ended: then it goes here, and not under the lock
        }
    }

private:
    friend class Schedule;

    struct Entry {
        uint64_t arrival = 0; // of the leg
        std::shared_ptr<Gate> gate;
        bool is_open = false;
    };
    std::array<Entry, kMost> entries_;
    size_t count_ = 0;
};

class Schedule {
public:
    // The leg stays the job's; the schedule forgets it when all of it has been handed out, or when it was cut short.
    void add(Leg &leg) {
        const auto &gate = leg.job->gate;
        LegLine &line = gate && !gate->was_open() ? lines_of(leg).following : line_of_moving(leg);
        leg.place = line.emplace_hint(line.end(), next_arrival_, &leg);
        leg.line = &line;
        ++next_arrival_;
    }

    bool empty() const { return lines_[0].empty() && lines_[1].empty(); }

    // The oldest leg that can move; NULL if there is none. Legs that still follow a stream, or whose next part has not
    // been recorded yet, let the others pass; and so do those that `waits` says it of.
    Leg *front(uint32_t priority) {
        return front(priority, [](const Leg &) { return false; });
    }
    template <class Function>
    Leg *front(uint32_t priority, Function &&waits) {
        for (const auto &[arrival, leg] : lines_[priority].ready) {
            if (!waits(*leg)) return leg;
        }
        return nullptr;
    }

    // Lets `take_pieces` take what it wants from the parts of a leg that front() gave. What was taken is given back as
    // one.
    template <class Function>
    void take(Leg &leg, Function &&take_pieces) {
        take_pieces();
        ++leg.in_flight;
        if (leg.parts.at_end()) {
            leave(leg);
        } else if (leg.parts.empty()) {
            move(leg, lines_of(leg).recording);
        }
    }

    // More of a leg that is not closed. False if it was cut short, and then its job may have ended.
    bool extend(Leg &leg, Layout &&part) {
        if (leg.parts.is_closed()) return false;
        leg.parts.add(std::move(part));
        if (leg.line == &lines_of(leg).recording) move(leg, line_of_moving(leg));
        return true;
    }

    // The leg is complete. True if it has ended with this, as of give_back(); a leg that was cut short has
    // ended, or will, without.
    bool finish(Leg &leg) {
        if (leg.parts.is_closed()) return false;
        leg.parts.close();
        if (!leg.parts.at_end()) return false;
        leave(leg);
        return leg.in_flight == 0;
    }

    // What was taken has moved. True if its leg has ended with it: then the caller tells the job, outside the
    // lock.
    bool give_back(Leg &leg) {
        --leg.in_flight;
        return leg.in_flight == 0 && leg.parts.at_end();
    }

    // ---- Legs that follow streams ----

    bool has_following(uint32_t priority) const { return !lines_[priority].following.empty(); }

    // Notes which gates to ask next: all of that priority, one after another, over several calls. True if
    // every one has been noted since this last was true.
    bool next_gates(uint32_t priority, GateCheck &check) {
        Lines &lines = lines_[priority];
        auto it = lines.following.upper_bound(lines.last_asked);
        for (; it != lines.following.end() && check.count_ < GateCheck::kMost; ++it) {
            check.entries_[check.count_++] = {it->first, it->second->job->gate, false};
            lines.last_asked = it->first;
        }
        if (it != lines.following.end()) return false;
        lines.last_asked = 0;
        return true;
    }

    // Legs whose gates were found open may move, each in its own place. True if there is one.
    bool admit(uint32_t priority, const GateCheck &check) {
        LegLine &following = lines_[priority].following;
        bool any = false;
        for (size_t i = 0; i < check.count_; ++i) {
            if (!check.entries_[i].is_open) continue;
            const auto it = following.find(check.entries_[i].arrival);
            if (it == following.end()) continue; // cut short meanwhile
            move(*it->second, line_of_moving(*it->second));
            any = true;
        }
        return any;
    }

    // ---- Legs whose job is stopping ----

    // Ends handing out pieces of a leg. True if it has ended with this, as of give_back(). Does nothing with a leg that is
    // not in the schedule: it is not there yet, or has been handed out. Looks at no other leg.
    bool cut_short(Leg &leg) {
        if (!leg.line) return false;
        leg.parts.cut_short();
        leave(leg);
        return leg.in_flight == 0;
    }

    // As cut_short(), for every leg whose job is stopping. Those that have ended are moved to `ended`.
    void sweep(LegLine &ended) {
        for_each([&](Leg &leg) {
            if (!leg.job->stopping()) return;
            leg.parts.cut_short();
            if (leg.in_flight == 0) {
                move(leg, ended);
                leg.line = nullptr;
            } else {
                leave(leg);
            }
        });
    }

    // The function may take the leg out.
    template <class Function>
    void for_each(Function &&function) {
        for (Lines &lines : lines_) {
            for (LegLine *line : {&lines.ready, &lines.recording, &lines.following}) {
                for (auto it = line->begin(); it != line->end();) function(*(it++)->second);
            }
        }
    }

private:
    struct Lines {
        LegLine ready;
        LegLine recording; // nothing of them can move until more is recorded
        LegLine following; // a stream that was at work when it was last asked
        uint64_t last_asked = 0;

        bool empty() const { return ready.empty() && recording.empty() && following.empty(); }
    };

    Lines &lines_of(const Leg &leg) { return lines_[leg.job->priority]; }
    // Of a leg that follows nothing any more.
    LegLine &line_of_moving(const Leg &leg) {
        return leg.parts.empty() ? lines_of(leg).recording : lines_of(leg).ready;
    }

    static void move(Leg &leg, LegLine &line) {
        leg.place = line.insert(leg.line->extract(leg.place)).position;
        leg.line = &line;
    }
    static void leave(Leg &leg) {
        leg.line->erase(leg.place);
        leg.line = nullptr;
    }

    std::array<Lines, 2> lines_; // by priority
    uint64_t next_arrival_ = 1;
};

} // namespace kvf
