// A schedule and its lock, for devices whose threads share it with those who submit and cancel.
#pragma once

#include <mutex>
#include <utility>

#include "jobs/schedule.h"

namespace kvf {

class LockedSchedule {
public:
    std::unique_lock<std::mutex> lock() { return std::unique_lock(mutex_); }
    // With the lock.
    Schedule &legs() { return legs_; }

    // ---- Without the lock. A leg that ends with such a call is reported: Job::leg_ended(). ----

    // Takes a leg in. Under the lock, `before` is called first, and `wake` last. Where `before`
    // throws, the leg has not been taken in.
    template <class Before, class Wake>
    void add(Leg &leg, Before &&before, Wake &&wake) {
        bool ended = false;
        {
            std::lock_guard lock(mutex_);
            before();
            legs_.add(leg);
            // A job that was asked to stop before its leg was added did not find the leg then.
            if (leg.job->stopping()) ended = legs_.cut_short(leg);
            wake();
        }
        if (ended) leg.job->leg_ended(leg);
    }

    void close(Leg &leg) {
        end_if(leg, [&] { return legs_.close(leg); });
    }
    void piece_ended(Leg &leg) {
        end_if(leg, [&] { return legs_.piece_ended(leg); });
    }

    // `wake` is called under the lock.
    template <class Wake>
    void cut_short(Leg &leg, Wake &&wake) {
        end_if(leg, [&] {
            const bool ended = legs_.cut_short(leg);
            wake();
            return ended;
        });
    }
    void cut_short(Leg &leg) {
        cut_short(leg, [] {});
    }
    template <class Wake>
    void cut_short_stopping(Wake &&wake) {
        LegList ended;
        {
            std::lock_guard lock(mutex_);
            legs_.cut_short_stopping(ended);
            wake();
        }
        for (const auto &[order, leg] : ended) leg->job->leg_ended(*leg);
    }
    void cut_short_stopping() {
        cut_short_stopping([] {});
    }

protected:
    std::mutex mutex_;
    Schedule legs_;

private:
    template <class Function>
    void end_if(Leg &leg, Function &&has_ended) {
        {
            std::lock_guard lock(mutex_);
            if (!has_ended()) return;
        }
        leg.job->leg_ended(leg);
    }
};

} // namespace kvf
