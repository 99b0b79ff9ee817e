// A device holds the memory that regions name, and moves legs of jobs between it and buffers.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "jobs/leg.h"

namespace kvf {

// A set of devices, by their indices.
using DeviceSet = uint64_t;
inline DeviceSet device_set(uint32_t device) { return DeviceSet{1} << device % 64; }

class Device {
public:
    static constexpr uint32_t kHost = 0; // index of the host

    explicit Device(uint32_t index) : index(index) {}
    virtual ~Device() = default;
    Device(const Device &) = delete;
    Device &operator=(const Device &) = delete;

    const uint32_t index; // among the engine's devices

    // Throws KVF_ERR_DEVICE_LOST where nothing can be moved any more.
    virtual void check_usable() {}

    // A JSON object for kvf_engine_describe().
    virtual std::string describe() const = 0;

    // Takes a leg in. The leg ends with exactly one leg.job->leg_ended(leg), on any thread. Where
    // submit() throws instead, the device has not taken the leg in.
    virtual void submit(Leg &leg) = 0;

    // Adds a part to a leg that is not closed. Does nothing once the leg was cut short.
    virtual void extend(Leg &leg, Layout &&part) = 0;
    // Closes a leg: no part of it will follow. Does nothing once the leg was cut short.
    virtual void close(Leg &leg) = 0;

    // A leg of this direction is about to be submitted. The thread that will move it may wake up
    // already.
    virtual void announce(Direction) {}

    // The leg's job is stopping: the device moves no more of the leg, which ends soon. In constant
    // time, however many legs there are. May be called before submit(), and after the leg has
    // ended.
    virtual void cut_short(Leg &leg) = 0;
    // cut_short() for all legs whose jobs are stopping.
    virtual void cut_short_stopping() = 0;

    // The first half of a save by snapshot: copies what the layout names, so that its memory may
    // change when the function returns. Blocks. Returns what remains to be moved into the buffer.
    // Throws KVF_ERR_OUT_OF_MEMORY where there is no room for the copy; nothing has happened then.
    struct Snapshot {
        Layout layout;
        std::shared_ptr<void>
            memory; // that the layout lies in; to be kept until all of it has moved
    };
    virtual Snapshot snapshot(const Layout &layout, unsigned char *buffer) = 0;

    // Returns device memory for the parts of a buffer that are to be loaded ahead; NULL where there
    // is no room for them, or where the device loads nothing ahead. The parts are staged and placed
    // in their order.
    virtual std::shared_ptr<LoadAhead> make_load_ahead(const std::vector<BufferPart> &) {
        return nullptr;
    }

    // Returns memory of the device's own that no transfer uses to the system.
    virtual void trim() {}

    // Ends the device's threads. No leg is in flight, and none will be submitted.
    virtual void stop() = 0;
};

} // namespace kvf
