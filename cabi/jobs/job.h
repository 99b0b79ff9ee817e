// A job: one submitted transfer, which ends with exactly one completion. A leg is the part of it that
// one device moves.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "core/handle.h"
#include "jobs/load_ahead.h"
#include "jobs/owner.h"
#include "jobs/queue.h"
#include "memory/layout.h"
#include "memory/memory.h"

namespace kvf {

class Job;

// Work of somebody else's that a job must follow.
class Gate {
public:
    virtual ~Gate() = default;
    // True from the moment on when that work is done. Asks a driver, which takes microseconds: not for callers that
    // hold a lock. Any thread.
    bool is_open();
    // As is_open() last found it. Asks nobody.
    bool was_open() const { return open_.load(std::memory_order_acquire); }
    // Blocks until then.
    void wait();

private:
    virtual bool is_done() = 0;

    std::atomic<bool> open_{false};
};

// A set of devices, by their indices in the engine.
using DeviceSet = uint64_t;
inline DeviceSet device_set(uint32_t device) { return DeviceSet{1} << device % 64; }

struct Leg;
using LegLine = std::map<uint64_t, Leg *>; // by arrival at the device

struct Leg {
    Leg(uint32_t device, Direction direction) : device(device), direction(direction) {}
    Leg(const Leg &) = delete;
    Leg &operator=(const Leg &) = delete;

    std::shared_ptr<Job> job; // while the leg is a device's: keeps the job alive
    const uint32_t device;
    const Direction direction; // the job's

    // The rest belongs to the device's schedule, and is guarded by its lock.
    Parts parts;
    // The load ahead that the leg stages; NULL for any other leg. Set before the leg is a device's.
    std::shared_ptr<LoadAhead> load_ahead;
    uint32_t in_flight = 0;  // pieces handed out and not given back
    LegLine *line = nullptr; // of the schedule's, in which it stands; NULL: in none
    LegLine::iterator place; // there
};

class Job final : public Object, public std::enable_shared_from_this<Job> {
public:
    static constexpr ObjectType kType = ObjectType::Job;

    // What a submitting function knows about it. Set before the job starts, constant afterwards; what it
    // learns while it records is set before it lets go.
    Direction direction = Direction::Save;
    uint32_t priority = KVF_PRIORITY_BACKGROUND;
    uint32_t mode = 0;
    unsigned char *buffer = nullptr; // of a load: only read
    uint64_t bytes = 0;
    uint64_t fragments = 0;
    uint64_t segments = 0;
    uint64_t user_data = 0;
    const void *owned_by = nullptr; // the attachment it belongs to, if any
    uint64_t submitted_ns = 0, listed_ns = 0, recorded_ns = 0;
    std::shared_ptr<Queue> queue; // a place is reserved in it
    Callbacks callback;           // one or none
    // Called once, with the final status, before the completion can be seen by anybody.
    std::function<void(int32_t)> on_end;

    const uint64_t handle = new_handle(ObjectType::Job);
    JobOwner *owner = nullptr;          // valid until the job has ended
    std::weak_ptr<JobOwner> weak_owner; // the same, for callers who do not know whether it has
    std::shared_ptr<MemoryUse> memory;
    bool pinned = false; // the buffer is
    std::shared_ptr<Gate> gate;
    std::vector<std::shared_ptr<void>> keep; // until it has ended
    std::vector<std::unique_ptr<Leg>> legs;  // the submitter's, who adds them by add_leg()
    std::atomic<DeviceSet> devices{0};       // of the legs

    // Nothing more of it needs to move: it was cancelled, or a leg failed.
    bool stopping() const { return stopping_.load(std::memory_order_acquire); }
    void cancel();
    // Its legs are told by JobOwner::stop().
    void fail(int32_t status, const std::string &detail);
    // Blocks until what it follows is done, or it is to stop.
    void wait_for_turn() const;
    void note_started(uint64_t ns);
    Leg &add_leg(std::unique_ptr<Leg> leg);
    // For threads that are not the submitter's; NULL if there are not as many.
    Leg *leg(size_t index);
    // The job ends when the last of its legs has ended and its submitter has let go of it.
    void expect_leg() { holds_.fetch_add(1, std::memory_order_relaxed); }
    void leg_ended(Leg &leg);
    void let_go();
    // Nobody is told of its end: the submitting call fails. Before the submitter lets go.
    void retract() { retracted_ = true; }
    bool is_retracted() const { return retracted_; }

    // Sets the words to 1 when the job has ended; now, if it has. They must stay until then.
    void raise_at_end(const std::vector<std::atomic<uint32_t> *> &words);

    bool ended(kvf_completion *completion);
    bool wait(int64_t timeout_ns, kvf_completion *completion);

private:
    void end();

    std::atomic<bool> stopping_{false};
    std::atomic<uint32_t> holds_{1}; // the submitter's, and the legs'
    bool retracted_ = false;
    std::atomic<uint64_t> started_ns_{0};

    std::mutex mutex_; // for what follows, and for the growth of `legs`
    std::condition_variable ended_;
    bool has_ended_ = false;                     // its status is final
    bool has_ended_visible_ = false;             // waiters may see it: its bookkeeping is done
    std::vector<std::atomic<uint32_t> *> words_; // to be set
    int32_t status_ = KVF_OK;
    std::string detail_;
    kvf_completion completion_{};
};

} // namespace kvf
