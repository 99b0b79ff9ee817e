// Finds, while background copies run, how large their pieces should be and how many of them should be queued.
//
// A program that decodes copies a little at every step, and that copy waits for what is queued before it:
// `window` pieces of `bytes`. Small pieces spare it, but each costs the link an overhead. The time from the end of
// one piece to the end of the next is
//
//     time = overhead(window) + bytes / bandwidth
//
// so that a wanted share of the bandwidth needs bytes = share / (1 - share) * overhead * bandwidth, and of two
// windows the better one is that with less queued. Overheads and bandwidth are measured: at times a few
// pieces are made half as large, and then a few are queued alone. (One H200: 3.4 us with two pieces queued, 11 us with
// one, 55 GB/s: 4.3 MiB, two of them, for a share of 0.96. A link of a fifth of its speed wants a fifth of that.)
//
// Not locked; knows no clock and no device.
#pragma once

#include <array>
#include <cstdint>

namespace kvf {

class Pacer {
public:
    static constexpr uint64_t kLeastBytes = 512 << 10;
    static constexpr uint64_t kMostBytes = 16 << 20;

    // `share` of the bandwidth is wanted; it starts with two pieces of `bytes`.
    Pacer(double share, uint64_t bytes) : share_(share) { settled_.bytes = pace_.bytes = bytes; }

    struct Pace {
        uint64_t bytes = 0;
        uint32_t window = 2;
        uint32_t epoch = 0; // a number for all pieces of one pace
    };
    // For the next piece.
    const Pace &pace() const { return pace_; }

    // A piece of that epoch has ended, `ns` after the one before it; pieces were there to be queued all the time.
    void note(uint32_t epoch, uint64_t bytes, uint64_t ns);

    // Times should be exact at the moment.
    bool measuring() const { return phase_ != Phase::Settled; }
    // From one piece's end to the next, at the settled pace; 0: not known yet.
    uint64_t expected_ns() const { return expected_ns_; }

private:
    static constexpr uint32_t kMeasured = 16;  // pieces of an epoch that is measured
    static constexpr uint32_t kSettled = 1024; // pieces from one measurement to the next
    static constexpr uint32_t kSkipped =
        2; // pieces at the start of an epoch, which the one before has touched
    static constexpr uint32_t kRounds = 5; // the median of so many measurements counts

    enum class Phase { Full, Half, Alone, Settled };
    struct Mean {
        double bytes = 0, ns = 0;
    };
    // The last few values; their median.
    struct Median {
        std::array<double, kRounds> values{};
        uint32_t count = 0;
        void add(double value) { values[count++ % kRounds] = value; }
        double get() const;
    };

    void begin(Phase phase);
    void learn();

    const double share_;
    Pace settled_, pace_;
    Phase phase_ = Phase::Full;
    uint32_t pieces_ = 0; // of the epoch
    Mean sum_, full_, half_, alone_;
    Median bandwidth_, overhead_, overhead_alone_; // bytes a nanosecond; nanoseconds
    uint64_t expected_ns_ = 0;
};

} // namespace kvf
