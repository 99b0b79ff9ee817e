// The pace of background copies follows the link: no larger pieces than the wanted share of its
// speed needs.
#include "cuda/pacer.h"

#include <cstdlib>
#include <functional>
#include <random>

#include "check.hpp"

using kvf::Pacer;

namespace {

constexpr uint64_t kMiB = 1 << 20;

struct Link {
    double bytes_per_ns, overhead_ns, overhead_alone_ns;

    uint64_t time(const Pacer::Pace &pace) const {
        const double overhead = pace.window == 1 ? overhead_alone_ns : overhead_ns;
        return static_cast<uint64_t>(overhead + static_cast<double>(pace.bytes) / bytes_per_ns);
    }
};

using Noise = std::function<uint64_t(uint64_t)>;

// Runs pieces until the pacer has measured so many times; the pace that it has settled on.
Pacer::Pace settle(Pacer &pacer, const Link &link, int rounds, const Noise &noise = {}) {
    for (int round = 0; round < rounds; ++round) {
        while (!pacer.measuring()) pacer.note(pacer.pace().epoch, kMiB, 1000);
        for (int i = 0; pacer.measuring(); ++i) {
            CHECK(i < 1000);
            const Pacer::Pace pace = pacer.pace();
            const uint64_t time = link.time(pace);
            pacer.note(pace.epoch, pace.bytes, noise ? noise(time) : time);
        }
    }
    return pacer.pace();
}

bool is_about(uint64_t value, double expected, double tolerance) {
    const double ratio = static_cast<double>(value) / expected;
    return ratio > 1 - tolerance && ratio < 1 + tolerance;
}

void pieces_are_as_large_as_the_share_needs() {
    const Link h200{55, 3400, 11000};
    for (const double share : {0.90, 0.96}) {
        Pacer pacer(share, 4 * kMiB);
        const Pacer::Pace pace = settle(pacer, h200, 1);
        CHECK(pace.window == 2);
        CHECK(is_about(pace.bytes, share / (1 - share) * 3400 * 55, 0.05));
        CHECK(is_about(pacer.expected_ns(), static_cast<double>(h200.time(pace)), 0.05));
    }
}

void a_slow_link_gets_small_pieces() {
    Pacer pacer(0.96, 4 * kMiB);
    CHECK(is_about(settle(pacer, {12, 3400, 11000}, 1).bytes, 24 * 3400.0 * 12, 0.1));
}

void one_piece_is_queued_where_that_costs_little() {
    Pacer pacer(0.96, 4 * kMiB);
    const Pacer::Pace pace = settle(pacer, {55, 3400, 4000}, 1);
    CHECK(pace.window == 1 && is_about(pace.bytes, 24 * 4000.0 * 55, 0.1));
    // It goes on measuring with two, and finds back.
    CHECK(settle(pacer, {55, 3400, 20000}, 5).window == 2);
}

// Pieces that a kernel gathers, beside decoding on an H100: alone, each waits for its kernel. A
// single piece of 16 MiB would reach 0.86 of the link.
void one_piece_is_not_queued_where_it_cannot_reach_the_share() {
    const Link h100{54, 13000, 50000};
    Pacer pacer(0.93, 4 * kMiB);
    const Pacer::Pace pace = settle(pacer, h100, 1);
    CHECK(pace.window == 2);
    CHECK(is_about(pace.bytes, 0.93 / 0.07 * 13000 * 54, 0.05));
    const double reached =
        static_cast<double>(pace.bytes) / 54 / static_cast<double>(h100.time(pace));
    CHECK(reached > 0.92);
    // Where not even two reach it, two are nearer.
    Pacer hopeless(0.93, 4 * kMiB);
    CHECK(settle(hopeless, {54, 60000, 90000}, 1).window == 2);
}

void bounds_hold() {
    Pacer fast(0.99, 4 * kMiB), free(0.96, 4 * kMiB);
    CHECK(settle(fast, {200, 20000, 40000}, 1).bytes == Pacer::kMostBytes);
    CHECK(settle(free, {55, 0, 11000}, 1).bytes == Pacer::kLeastBytes);
}

void noise_is_outvoted() {
    std::mt19937 random(1);
    const auto noise = [&](uint64_t time) {
        const uint64_t spread = time * (random() % 40) / 1000; // up to 4 %
        return time + spread + (random() % 200 == 0 ? 300'000 : 0);
    };
    Pacer pacer(0.96, 4 * kMiB);
    const Pacer::Pace pace = settle(pacer, {55, 3400, 11000}, 9, noise);
    CHECK(pace.bytes >= 2 * kMiB && pace.bytes <= 8 * kMiB);
}

void what_makes_no_sense_changes_nothing() {
    for (const uint64_t ns : {uint64_t{0}, uint64_t{77'000}, UINT64_MAX / 64}) {
        Pacer pacer(0.96, 4 * kMiB);
        const Pacer::Pace pace = settle(pacer, {55, 3400, 11000}, 3, [&](uint64_t) { return ns; });
        CHECK(pace.bytes == 4 * kMiB && pace.window == 2);
    }
    // Pieces that could not be cut in halves: rows too wide, say.
    Pacer pacer(0.96, 4 * kMiB);
    for (int i = 0; pacer.measuring(); ++i) pacer.note(pacer.pace().epoch, 3 * kMiB, 70'000);
    CHECK(pacer.pace().bytes == 4 * kMiB);
}

void pieces_of_another_epoch_do_not_count() {
    Pacer pacer(0.96, 4 * kMiB);
    const uint32_t epoch = pacer.pace().epoch;
    for (int i = 0; i < 1000; ++i) pacer.note(epoch + 1, 4 * kMiB, 80'000);
    CHECK(pacer.pace().epoch == epoch && pacer.measuring());
}

void it_measures_again() {
    Pacer pacer(0.96, 4 * kMiB);
    settle(pacer, {55, 3400, 11000}, 1);
    // The link has become slow, for another device shares it.
    CHECK(is_about(settle(pacer, {20, 3400, 11000}, 5).bytes, 24 * 3400.0 * 20, 0.1));
}

} // namespace

int main() {
    pieces_are_as_large_as_the_share_needs();
    a_slow_link_gets_small_pieces();
    one_piece_is_queued_where_that_costs_little();
    one_piece_is_not_queued_where_it_cannot_reach_the_share();
    bounds_hold();
    noise_is_outvoted();
    what_makes_no_sense_changes_nothing();
    pieces_of_another_epoch_do_not_count();
    it_measures_again();
}
