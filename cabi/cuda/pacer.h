// Finds, while background copies run, how large their pieces should be and how many of them should
// be queued.
//
// A program that decodes copies a little at every step, and its copy waits for the pieces that are
// queued before it: `window` pieces of `bytes`. With small pieces it waits less, but each piece
// costs the link an overhead. The time from the end of one piece to the end of the next is
//
//     time = overhead(window) + bytes / bandwidth
//
// so that a share of the bandwidth needs bytes = share / (1 - share) * overhead * bandwidth. Of two
// windows that reach the share, the better one has fewer bytes queued. The pacer measures overheads
// and bandwidth: from time to time it makes a few pieces half as large, and then it queues a few
// pieces alone. (An H200 had overheads of 3.4 us with two pieces queued and 11 us with one, at 55
// GB/s. That gives two pieces of 4.3 MiB for a share of 0.96. A link of a fifth of that speed needs
// pieces of a fifth of that size.)
//
// The caller locks. The pacer knows no clock and no device.
#pragma once

#include <array>
#include <cstdint>

namespace kvf {

class Pacer {
public:
    static constexpr uint64_t kLeastBytes = 512 << 10;
    static constexpr uint64_t kMostBytes = 16 << 20;

    // Aims at `share` of the bandwidth, and starts with two pieces of `bytes`.
    Pacer(double share, uint64_t bytes) : share_(share) { settled_.bytes = pace_.bytes = bytes; }

    struct Pace {
        uint64_t bytes = 0;
        uint32_t window = 2;
        uint32_t epoch = 0; // a number for all pieces of one pace
    };
    // The pace of the next piece.
    const Pace &pace() const { return pace_; }

    // A piece of that epoch has ended, `ns` nanoseconds after the piece before it. Other pieces
    // were waiting to be queued all the time.
    void note(uint32_t epoch, uint64_t bytes, uint64_t ns);

    // Whether pieces are being measured, so that their times must be exact.
    bool measuring() const { return phase_ != Phase::Settled; }
    // The time from one piece's end to the next at the settled pace; 0: not known yet.
    uint64_t expected_ns() const { return expected_ns_; }

private:
    static constexpr uint32_t kMeasured = 16;  // pieces of an epoch that is measured
    static constexpr uint32_t kSettled = 1024; // pieces from one measurement to the next
    static constexpr uint32_t kRounds = 5;     // measurements of which the median counts
    // Pieces at the start of an epoch that are left out, since pieces of the epoch before have
    // influenced their times.
    static constexpr uint32_t kSkipped = 2;

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
