// A device holds the memory that regions name, and moves legs of jobs between it and buffers.
#pragma once

#include <memory>
#include <string>

#include "jobs/job.h"

namespace kvf {

class Device {
public:
    virtual ~Device() = default;

    // Throws KVF_ERR_DEVICE_LOST where nothing can be moved any more.
    virtual void check_usable() {}

    // A JSON object for kvf_engine_describe().
    virtual std::string describe() const = 0;

    // Takes a leg in; it ends with exactly one leg.job->leg_ended(leg), on any thread. Where it throws
    // instead, the leg has not been taken in.
    virtual void submit(Leg &leg) = 0;

    // More of a leg that is not closed; and its end. Neither does anything once the leg was cut short.
    virtual void extend(Leg &leg, Layout &&part) = 0;
    virtual void finish(Leg &leg) = 0;

    // A leg of this direction is about to come: whoever takes it in may wake up already.
    virtual void expect(Direction) {}

    // The leg's job is stopping: no more of it is moved, and it ends soon. In constant time, however many legs there
    // are. May be called before the leg is the device's, and after it has ended.
    virtual void cut_short(Leg &leg) = 0;
    // As cut_short(), for all legs whose jobs are stopping.
    virtual void sweep() = 0;

    // Saves a layout while the caller waits, as far as is needed for its memory to be free to change:
    // the first half of a save by snapshot. Returns what remains to be moved.
    // Throws KVF_ERR_OUT_OF_MEMORY where there is no room for it; nothing has happened then.
    struct Snapshot {
        Layout layout;
        std::shared_ptr<void> memory; // that the layout lies in; to be kept until it has been moved
    };
    virtual Snapshot snapshot(const Layout &layout, unsigned char *buffer) = 0;

    // Returns device memory for a state of `bytes` that is to be loaded ahead; NULL where there is no room for it, or
    // where the device loads nothing ahead.
    virtual std::shared_ptr<LoadAhead> make_load_ahead(uint64_t bytes) {
        (void)bytes;
        return nullptr;
    }

    // Gives back to the system what memory of its own it does not use at the moment.
    virtual void trim() {}

    // Ends the threads. No leg is in flight, and none comes any more.
    virtual void stop() = 0;
};

} // namespace kvf
