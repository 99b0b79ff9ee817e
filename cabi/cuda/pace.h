// How large the background copies of a lane are, and how many of them it queues: a pacer for each
// way that pieces go.
#pragma once

#include <array>
#include <atomic>
#include <string>

#include "cuda/pacer.h"
#include "cuda/slot.h"

namespace kvf {

// For the pump alone, but for describe().
class CudaPace {
public:
    explicit CudaPace(Direction direction);

    const Pacer::Pace &of(CudaWay way) const { return pacer(way).pace(); }
    // The time from one copy's end to the next, in nanoseconds; 0 where the times have to be
    // measured exactly at the moment, or where nothing is known yet.
    uint64_t expected_ns(CudaWay way) const;

    // A copy has ended. The pacer learns from it where it was a background copy and other copies
    // were always waiting to be queued: `more` tells whether some are now.
    void copy_ended(const CudaSlot &slot, bool is_urgent, bool more);

    // A JSON object. Any thread.
    std::string describe() const;

private:
    struct Published {
        std::atomic<uint64_t> bytes;
        std::atomic<uint32_t> window;
    };

    const Pacer &pacer(CudaWay way) const { return pacers_[static_cast<size_t>(way)]; }
    void publish(size_t way);

    std::array<Pacer, kCudaWays> pacers_;
    uint64_t last_end_ns_ = 0; // of a background copy that had more behind it; 0: none
    std::array<Published, kCudaWays> published_{};
};

} // namespace kvf
