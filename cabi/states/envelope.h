// The envelope of an opaque state: 64 bytes behind what libllama wrote.
//
// Where no known format describes a cache's states (formats.h), a damaged one cannot be told from a
// whole one by its structure. So kvferry puts an envelope behind each state that it saves there,
// and verifies it before libllama sees the state again. The checksum has no key: it tells damage,
// and no forgery. The state itself stays what libllama wrote, from its first byte on. Words are
// little-endian.
#pragma once

#include <cstdint>
#include <string>

namespace kvf {

class Envelope {
public:
    static constexpr uint64_t kBytes = 64;

    // Writes the envelope of [state, state + bytes) behind it; there must be room for kBytes.
    static void seal(unsigned char *state, uint64_t bytes, uint64_t fingerprint);

    // The bytes end with something that was meant to be an envelope.
    static bool is_on(const unsigned char *sealed, uint64_t bytes);

    // Reads the whole state. `why` is "" if state and envelope are whole and were written for this
    // fingerprint.
    struct Verdict {
        bool damaged = false, foreign = false;
        std::string why;
    };
    static Verdict verify(const unsigned char *sealed, uint64_t bytes, uint64_t fingerprint);
};

} // namespace kvf
