// Which piece moves next: urgent jobs before background ones, jobs of equal priority in turn. Not
// locked: the device that owns it does that. But for add(), nothing here takes memory: what has been
// taken in can be moved and ended whatever happens.
#pragma once

#include <algorithm>
#include <list>

#include "job.h"

namespace kvf {

class Schedule {
public:
    using Legs = std::list<Leg *>;

    // The leg stays the job's; the schedule forgets it when it has ended.
    void add(Leg &leg) { waiting(leg).push_back(&leg); }

    bool empty() const { return urgent_.empty() && background_.empty(); }
    bool has(uint32_t priority) const {
        return !(priority == KVF_PRIORITY_URGENT ? urgent_ : background_).empty();
    }

    // The leg whose turn it is; NULL if there is none that may begin. Legs that still follow other work, or
    // whose next part has not been recorded yet, let the others pass; and so do those that `waits` says it of.
    Leg *front(uint32_t priority) {
        return front(priority, [](const Leg &) { return false; });
    }
    template <class Function>
    Leg *front(uint32_t priority, Function &&waits) {
        auto &legs = priority == KVF_PRIORITY_URGENT ? urgent_ : background_;
        for (size_t i = 0; i < legs.size(); ++i) {
            Leg *leg = legs.front();
            const auto &gate = leg->job->gate;
            if (!leg->parts.empty() && (!gate || gate->is_open()) && !waits(*leg)) return leg;
            rotate(legs);
        }
        return nullptr;
    }

    // Lets `take_pieces` take what it wants from the parts of a leg that front() gave, and moves the leg to
    // the back of its line. What was taken is given back as one.
    template <class Function>
    void take(Leg &leg, Function &&take_pieces) {
        take_pieces();
        ++leg.in_flight;
        auto &legs = waiting(leg);
        if (leg.parts.at_end()) {
            legs.pop_front();
        } else {
            rotate(legs);
        }
    }

    // The leg is complete. True if it has ended with this, as of give_back(); a leg that was cut short has
    // ended, or will, without.
    bool finish(Leg &leg) {
        if (leg.parts.is_closed()) return false;
        leg.parts.close();
        if (!leg.parts.at_end()) return false;
        auto &legs = waiting(leg);
        legs.erase(std::find(legs.begin(), legs.end(), &leg));
        return leg.in_flight == 0;
    }

    // What was taken has moved. True if its leg has ended with it: then the caller tells the job, outside the
    // lock.
    bool give_back(Leg &leg) {
        --leg.in_flight;
        return leg.in_flight == 0 && leg.parts.at_end();
    }

    template <class Function>
    void for_each(Function &&function) {
        for (auto *legs : {&urgent_, &background_}) {
            for (Leg *leg : *legs) function(*leg);
        }
    }

    // Ends handing out pieces of every leg whose job is stopping. Those with no piece in flight have
    // ended with it and are appended to `ended`; the others end with their last give_back().
    void sweep(Legs &ended) {
        for (auto *legs : {&urgent_, &background_}) {
            for (auto it = legs->begin(); it != legs->end();) {
                const auto at = it++;
                Leg &leg = **at;
                if (!leg.job->stopping()) continue;
                leg.parts.cut_short();
                if (leg.in_flight == 0) {
                    ended.splice(ended.end(), *legs, at);
                } else {
                    legs->erase(at);
                }
            }
        }
    }

private:
    static void rotate(Legs &legs) { legs.splice(legs.end(), legs, legs.begin()); }

    Legs &waiting(const Leg &leg) {
        return leg.job->priority == KVF_PRIORITY_URGENT ? urgent_ : background_;
    }

    Legs urgent_, background_;
};

} // namespace kvf
