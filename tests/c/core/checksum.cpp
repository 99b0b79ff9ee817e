// XXH64 as xxHash computes it, and the envelope around a state.
#include "core/checksum.h"

#include <vector>

#include "check.hpp"
#include "states/envelope.h"

using namespace kvf;

namespace {

// Values of the reference implementation (xxhsum -H1), for bytes 0, 1, 2 ... of these lengths.
void as_the_reference_computes_it() {
    const std::pair<size_t, uint64_t> known[] = {
        {0, 0xef46db3751d8e999u},  {1, 0xe934a84adb052768u},   {3, 0xe5c7bb4533bc65ddu},
        {4, 0xffced8604453cc1eu},  {7, 0x14cc643f630c72d2u},   {8, 0x884a173614b81b8du},
        {31, 0xc346d2b59b4d8ee1u}, {32, 0xcbf59c5116ff32b4u},  {33, 0x0c535d1acafb8eadu},
        {63, 0xe26aa9e2a95f8e4fu}, {100, 0x6ac1e58032166597u}, {1000, 0x6ef436b00eba4078u},
    };
    std::vector<unsigned char> bytes(1000);
    for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<unsigned char>(i);
    for (const auto &[length, value] : known) CHECK(checksum(bytes.data(), length) == value);
}

constexpr uint64_t kFingerprint = 0x1234;

std::vector<unsigned char> sealed(uint64_t state_bytes) {
    std::vector<unsigned char> bytes(state_bytes + Envelope::kBytes);
    for (size_t i = 0; i < state_bytes; ++i) bytes[i] = static_cast<unsigned char>(i * 7);
    Envelope::seal(bytes.data(), state_bytes, kFingerprint);
    return bytes;
}

void a_whole_state_is_found_whole() {
    const auto bytes = sealed(500);
    CHECK(Envelope::is_on(bytes.data(), bytes.size()));
    const auto verdict = Envelope::verify(bytes.data(), bytes.size(), kFingerprint);
    CHECK(verdict.why.empty() && !verdict.damaged && !verdict.foreign);
    CHECK(Envelope::verify(bytes.data(), bytes.size(), kFingerprint + 1).foreign);
}

void every_flipped_bit_is_found() {
    const auto whole = sealed(300);
    for (size_t bit = 0; bit < 8 * whole.size(); ++bit) {
        auto bytes = whole;
        bytes[bit / 8] ^= static_cast<unsigned char>(1u << bit % 8);
        CHECK(Envelope::verify(bytes.data(), bytes.size(), kFingerprint).damaged);
    }
}

void every_other_length_is_found() {
    const auto whole = sealed(300);
    for (size_t n = 0; n < whole.size(); ++n)
        CHECK(Envelope::verify(whole.data(), n, kFingerprint).damaged);
    auto longer = whole;
    longer.insert(longer.begin() + 10, 3, 0);
    CHECK(Envelope::verify(longer.data(), longer.size(), kFingerprint).damaged);
}

} // namespace

int main() {
    as_the_reference_computes_it();
    a_whole_state_is_found_whole();
    every_flipped_bit_is_found();
    every_other_length_is_found();
}
