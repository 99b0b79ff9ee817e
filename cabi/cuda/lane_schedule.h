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

    // Adds a leg. Calls `before` first, under the lock; if `before` throws, the leg is not added.
    template <class Function>
    void add(Leg &leg, Function &&before);
    void extend(Leg &leg, Layout &&part);
    // Announces that a leg will be added soon, and wakes the pump: waking takes several times as
    // long as queuing a copy.
    void announce();
    // Tells the pump to end when the schedule is empty.
    void stop();
    // Sets `flag` and wakes the pump: copy threads have filled or emptied a bounce buffer.
    void host_copy_ended(std::atomic<bool> &flag);

    // ---- The pump ----

    // Locks the schedule. Legs and parts that have been added until now count as seen.
    std::unique_lock<std::mutex> look();
    // Returns how many bytes of the leg have been taken. The caller does not hold the lock.
    uint64_t bytes_taken(const Leg &leg);

    // Asks some of the streams that legs follow whether they are done; without the lock, so that
    // nobody who submits or cancels waits for the driver's answers. Returns true if a leg may begin
    // now.
    bool ask_streams(bool is_moving);

    // Notes that something moves. Streams that are not done are asked again soon.
    void note_progress() { gated_since_ns_ = 0; }
    // Waits for the end of a copy by the copy threads, a millisecond at most.
    void wait_for_host_copy();
    // Waits until a leg or a part is added after the last look(), for `ns` nanoseconds at most.
    void wait_for_addition(uint64_t ns);

    enum class Next {
        Look, // something may move
        Spin, // a leg will be added at any moment
        Rest, // nothing was added for idle_ns()
        End,  // the pump shall end
    };
    // Waits until there is something to do, while no piece moves; for idle_ns() at most if
    // `may_rest`.
    Next wait(bool may_rest);

private:
    void wait_for_streams(std::unique_lock<std::mutex> &lock);
    bool has_additions() const { return additions_ != seen_additions_; }

    std::condition_variable work_;
    bool stopping_ = false;
    // A copy on the host has ended since the pump last waited for one.
    bool host_copy_ended_ = false;
    // Until then, a leg that was announced is expected.
    uint64_t expected_until_ns_ = 0;
    // How many legs and parts have been added: until now, and until the last look().
    uint64_t additions_ = 0;
    uint64_t seen_additions_ = 0;

    // When to ask streams; for the pump alone.

    // Whether some leg followed a stream at the last look().
    bool follows_streams_ = false;
    // By priority: whether every stream has been asked since the pump last waited for streams.
    std::array<bool, 2> all_asked_{};
    // When streams were last asked.
    uint64_t asked_ns_ = 0;
    // How long asking has taken since the pump last waited for streams, while nothing moved.
    uint64_t asking_ns_ = 0;
    // Since when there have been legs of which none could begin; 0: some can, or there are none.
    uint64_t gated_since_ns_ = 0;
};

template <class Function>
void CudaLaneSchedule::add(Leg &leg, Function &&before) {
    LockedSchedule::add(leg, std::forward<Function>(before), [this] {
        ++additions_;
        work_.notify_one();
    });
}

} // namespace kvf
