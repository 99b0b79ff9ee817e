#include "cuda/pace.h"

namespace kvf {
namespace {

// Where pacing begins, and the share of the link that it aims at: best on an H200
// (docs/performance.md). Loads cost decoding more than saves, and reach more with less.
constexpr uint64_t kFirstRun = 4 << 20, kFirstRows = 6 << 20, kFirstStaged = 4 << 20;
constexpr double kSavedRunShare = 0.975, kLoadedRunShare = 0.97, kRowsShare = 0.93;

} // namespace

CudaPace::CudaPace(Direction direction)
    : pacers_{Pacer(direction == Direction::Save ? kSavedRunShare : kLoadedRunShare, kFirstRun),
              Pacer(kRowsShare, kFirstRows), Pacer(kRowsShare, kFirstStaged)} {
    for (size_t way = 0; way < kCudaWays; ++way) publish(way);
}

uint64_t CudaPace::expected_ns(CudaWay way) const {
    return pacer(way).measuring() ? 0 : pacer(way).expected_ns();
}

void CudaPace::copy_ended(const CudaSlot &slot, bool is_urgent, bool more) {
    const uint64_t now = now_ns();
    if (!is_urgent && last_end_ns_) {
        const auto way = static_cast<size_t>(slot.way);
        pacers_[way].note(slot.epoch, slot.bytes, now - last_end_ns_);
        publish(way);
    }
    last_end_ns_ = !is_urgent && more ? now : 0;
}

void CudaPace::publish(size_t way) {
    const Pacer::Pace &pace = pacers_[way].pace();
    published_[way].bytes.store(pace.bytes, std::memory_order_relaxed);
    published_[way].window.store(pace.window, std::memory_order_relaxed);
}

std::string CudaPace::describe() const {
    const auto describe_way = [this](const char *name, CudaWay way) {
        const Published &pace = published_[static_cast<size_t>(way)];
        return format("\"%s\": {\"bytes\": %llu, \"queued\": %u}", name,
                      static_cast<unsigned long long>(pace.bytes.load()), pace.window.load());
    };
    return "{" + describe_way("runs", CudaWay::Run) + ", " + describe_way("rows", CudaWay::Rows) +
           ", " + describe_way("gathered", CudaWay::Staged) + "}";
}

} // namespace kvf
