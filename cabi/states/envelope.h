// The envelope of an opaque state: 64 bytes behind what libllama wrote.
//
// If no known format describes the states of a cache (formats.h), their structure does not tell
// whether a state is damaged. So kvferry writes an envelope behind each state that it saves of such
// a cache, and verifies the envelope before libllama sees the state again. The checksum has no key:
// it finds damage, not forgery. The state itself stays as libllama wrote it, from its first byte
// on. Words are little-endian.
#pragma once

#include <cstdint>
#include <string>

namespace kvf {

class Envelope {
public:
    static constexpr uint64_t kBytes = 64;

    // Writes the envelope of [state, state + bytes) behind it; there must be room for kBytes.
    static void seal(unsigned char *state, uint64_t bytes, uint64_t fingerprint);

    // Whether the bytes end with an envelope, even with a damaged one.
    static bool is_on(const unsigned char *sealed, uint64_t bytes);

    // Reads the whole state. `why` is "" if the state and its envelope are undamaged and were
    // written for this fingerprint; otherwise it is the reason for a refusal.
    struct Verdict {
        bool damaged = false, foreign = false;
        std::string why;
    };
    static Verdict verify(const unsigned char *sealed, uint64_t bytes, uint64_t fingerprint);
};

} // namespace kvf
