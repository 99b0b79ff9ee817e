// A leg: the part of a job that one device moves.
#pragma once

#include <cstdint>
#include <map>
#include <memory>

#include "jobs/load_ahead.h"
#include "memory/pieces.h"

namespace kvf {

class Device;
class Job;
struct Leg;

using LegList = std::map<uint64_t, Leg *>; // in the order in which the device got them

struct Leg {
    Leg(Device &device, Direction direction) : device(device), direction(direction) {}
    Leg(const Leg &) = delete;
    Leg &operator=(const Leg &) = delete;

    Device &device;
    const Direction direction; // the job's
    // From Device::submit() to Job::leg_ended(): keeps the job alive.
    std::shared_ptr<Job> job;
    // The load ahead that the leg stages; NULL for any other leg. Set before Device::submit().
    std::shared_ptr<LoadAhead> load_ahead;

    // The rest belongs to the device's schedule, and is guarded by the device's lock.
    Parts parts;
    uint32_t in_flight = 0;     // pieces that were taken and have not ended
    LegList *list = nullptr;    // of the schedule's, which the leg is in; NULL: in none
    LegList::iterator position; // there
};

} // namespace kvf
