// How large the background copies of a lane are, and how many of them it queues: a pacer for each
// way that pieces go.
#pragma once

#include <array>
#include <atomic>
#include <string>

#include "cuda/pacer.h"
#include "cuda/slot.h"

namespace kvf {

// For the pump alone, except describe().
class CudaPace {
public:
    explicit CudaPace(Direction direction);

    const Pacer::Pace &of(CudaWay way) const { return pacer(way).pace(); }
    // The time from one copy's end to the next, in nanoseconds. 0 while the pacer measures, when
    // the pump must not sleep; and while nothing is known yet.
    uint64_t expected_ns(CudaWay way) const;

    // A copy has ended. The pacer learns from a background copy if others were waiting to be queued
    // all the time. `more` tells whether some are waiting now.
    void copy_ended(const CudaSlot &slot, bool is_urgent, bool more);

    // Returns a JSON object. Any thread.
    std::string describe() const;

private:
    struct Published {
        std::atomic<uint64_t> bytes;
        std::atomic<uint32_t> window;
    };

    const Pacer &pacer(CudaWay way) const { return pacers_[static_cast<size_t>(way)]; }
    void publish(size_t way);

    std::array<Pacer, kCudaWays> pacers_;
    // When the last background copy ended, if others were waiting to be queued then; otherwise 0.
    uint64_t last_end_ns_ = 0;
    std::array<Published, kCudaWays> published_{};
};

} // namespace kvf
