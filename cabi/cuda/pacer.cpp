#include "cuda/pacer.h"

#include <algorithm>

namespace kvf {

double Pacer::Median::get() const {
    auto sorted = values;
    const uint32_t n = std::min(count, kRounds);
    std::sort(sorted.begin(), sorted.begin() + n);
    return sorted[n / 2];
}

void Pacer::note(uint32_t epoch, uint64_t bytes, uint64_t ns) {
    if (epoch != pace_.epoch) return;
    if (++pieces_ <= kSkipped) return;
    sum_.bytes += static_cast<double>(bytes);
    sum_.ns += static_cast<double>(ns);
    if (pieces_ < kSkipped + (measuring() ? kMeasured : kSettled)) return;
    const double n = pieces_ - kSkipped;
    const Mean mean{sum_.bytes / n, sum_.ns / n};
    switch (phase_) {
    case Phase::Full: full_ = mean; return begin(Phase::Half);
    case Phase::Half: half_ = mean; return begin(Phase::Alone);
    case Phase::Alone:
        alone_ = mean;
        learn();
        return begin(Phase::Settled);
    case Phase::Settled: return begin(Phase::Full);
    }
}

void Pacer::begin(Phase phase) {
    phase_ = phase;
    const uint32_t epoch = pace_.epoch + 1;
    pace_ = settled_;
    pace_.epoch = epoch;
    // Measurements are made with two pieces queued and with one, whatever the settled window is.
    if (phase != Phase::Settled) pace_.window = phase == Phase::Alone ? 1 : 2;
    if (phase == Phase::Half) pace_.bytes /= 2;
    pieces_ = 0;
    sum_ = {};
}

void Pacer::learn() {
    if (bandwidth_.count == 0) expected_ns_ = static_cast<uint64_t>(full_.ns); // as settled so far
    const double bytes = full_.bytes - half_.bytes, ns = full_.ns - half_.ns;
    // Somebody else has disturbed the measurement, or the pieces could not be cut to these sizes.
    if (bytes < full_.bytes / 8 || ns <= 0) return;
    const double bandwidth = bytes / ns;
    const double overhead = full_.ns - full_.bytes / bandwidth;
    if (overhead < -full_.ns / 4 || overhead > full_.ns) return;
    bandwidth_.add(bandwidth);
    overhead_.add(std::max(overhead, 0.0));
    overhead_alone_.add(std::max(alone_.ns - alone_.bytes / bandwidth, 0.0));

    const double factor = share_ / (1 - share_) * bandwidth_.get();
    const auto cut = [](double wanted) {
        return std::clamp(wanted, static_cast<double>(kLeastBytes),
                          static_cast<double>(kMostBytes));
    };
    const double wanted_alone = factor * overhead_alone_.get();
    const double two = cut(factor * overhead_.get()), one = cut(wanted_alone);
    // A single piece that would have to be larger than the largest cannot reach the share.
    const bool alone_reaches_share = wanted_alone <= static_cast<double>(kMostBytes);
    settled_.window = alone_reaches_share && one < 2 * two ? 1 : 2;
    constexpr uint64_t kGrain = 64 << 10;
    settled_.bytes = static_cast<uint64_t>(settled_.window == 1 ? one : two) / kGrain * kGrain;
    const double rest = settled_.window == 1 ? overhead_alone_.get() : overhead_.get();
    expected_ns_ =
        static_cast<uint64_t>(rest + static_cast<double>(settled_.bytes) / bandwidth_.get());
}

} // namespace kvf
