// The schedule of a lane, its lock, and what wakes the lane's pump: shared by the pump, by those
// who submit and cancel, and by the copy threads.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>

#include "jobs/locked_schedule.h"

namespace kvf {

class CudaLaneSchedule : public LockedSchedule {
public:
    // ---- Any thread ----

    // Takes a leg in. `before` is called first, under the lock; where it throws, the leg has not
    // been taken in.
    template <class Function>
    void add(Leg &leg, Function &&before);
    void extend(Leg &leg, Layout &&part);
    // A leg is about to come. Waking the pump takes several times as long as queuing a copy: it may
    // wake meanwhile.
    void announce();
    // The pump shall end when the schedule is empty.
    void stop();
    // Copy threads have filled or emptied a bounce buffer: sets `flag` and wakes the pump.
    void host_copy_ended(std::atomic<bool> &flag);

    // ---- The pump ----

    // Locks the schedule. What has come until now counts as seen.
    std::unique_lock<std::mutex> look();
    // Without the lock.
    uint64_t bytes_taken(const Leg &leg);

    // Asks some of the streams that legs follow whether they are done. Without the lock, so that
    // nobody who submits or cancels waits for the driver's answers. Returns true if a leg may begin
    // now.
    bool ask_streams(bool is_moving);

    // Something moves. Streams that have to be asked again are asked soon.
    void note_progress() { gated_since_ns_ = 0; }
    // Waits for the end of a copy by the copy threads, a millisecond at most.
    void wait_for_host_copy();
    // Waits for something that was not there at the last look(), so long at most.
    void wait_for_arrival(uint64_t ns);

    enum class Next {
        Look, // something may move
        Spin, // a leg is expected any moment
        Rest, // nothing has come for idle_ns()
        End,  // the pump shall end
    };
    // Waits until there is something to do, while no piece is under way; for idle_ns() at most if
    // `may_rest`.
    Next wait(bool may_rest);

private:
    void wait_for_streams(std::unique_lock<std::mutex> &lock);
    bool has_arrival() const { return arrivals_ != seen_arrivals_; }

    std::condition_variable work_;
    bool stopping_ = false;
    bool host_copy_ended_ = false;   // since the pump last waited for one
    uint64_t expected_until_ns_ = 0; // a leg is expected
    uint64_t arrivals_ = 0;          // of legs and of their parts
    uint64_t seen_arrivals_ = 0;     // at the last look()

    // The pump's own: when it asks streams.
    bool follows_streams_ = false; // some leg does, as of the last look()
    std::array<bool, 2>
        all_asked_{};       // by priority: every stream, since the pump last waited for them
    uint64_t asked_ns_ = 0; // when it last asked some
    // How long asking has taken since the pump last waited for streams, while nothing moved.
    uint64_t asking_ns_ = 0;
    // Since when there have been legs of which none could begin; 0: some can, or there are none.
    uint64_t gated_since_ns_ = 0;
};

template <class Function>
void CudaLaneSchedule::add(Leg &leg, Function &&before) {
    LockedSchedule::add(leg, std::forward<Function>(before), [this] {
        ++arrivals_;
        work_.notify_one();
    });
}

} // namespace kvf
