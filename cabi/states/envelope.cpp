#include "states/envelope.h"

#include <cstring>

#include "core/checksum.h"
#include "core/status.h"

namespace kvf {
namespace {

constexpr char kMark[8] = {'k', 'v', 'f', 's', 't', 'a', 't', 'e'};
constexpr uint32_t kVersion = 1;

struct Words {
    char mark[8];
    uint32_t version;
    uint32_t reserved; // 0
    uint64_t state_bytes;
    uint64_t fingerprint;
    uint64_t state_checksum;
    uint64_t reserved_too[2]; // 0
    uint64_t checksum;        // of the words before it
};
static_assert(sizeof(Words) == Envelope::kBytes);

uint64_t checksum_of(const Words &words) {
    return checksum(&words, sizeof words - sizeof words.checksum);
}

Words read(const unsigned char *sealed, uint64_t bytes) {
    Words words;
    std::memcpy(&words, sealed + bytes - Envelope::kBytes, sizeof words);
    return words;
}

} // namespace

void Envelope::seal(unsigned char *state, uint64_t bytes, uint64_t fingerprint) {
    Words words{};
    std::memcpy(words.mark, kMark, sizeof kMark);
    words.version = kVersion;
    words.state_bytes = bytes;
    words.fingerprint = fingerprint;
    words.state_checksum = checksum(state, bytes);
    words.checksum = checksum_of(words);
    std::memcpy(state + bytes, &words, sizeof words);
}

bool Envelope::is_on(const unsigned char *sealed, uint64_t bytes) {
    return bytes > kBytes && std::memcmp(sealed + bytes - kBytes, kMark, sizeof kMark) == 0;
}

Envelope::Verdict Envelope::verify(const unsigned char *sealed, uint64_t bytes,
                                   uint64_t fingerprint) {
    if (!is_on(sealed, bytes)) return {true, false, "it has no envelope"};
    const Words words = read(sealed, bytes);
    if (words.checksum != checksum_of(words)) return {true, false, "its envelope is damaged"};
    if (words.version != kVersion) {
        return {false, true,
                format("its envelope is of version %u, not %u", words.version, kVersion)};
    }
    if (words.state_bytes != bytes - kBytes) {
        return {true, false,
                format("it has %llu bytes instead of %llu",
                       static_cast<unsigned long long>(bytes - kBytes),
                       static_cast<unsigned long long>(words.state_bytes))};
    }
    if (words.fingerprint != fingerprint) return {false, true, "another model's context wrote it"};
    if (words.state_checksum != checksum(sealed, bytes - kBytes))
        return {true, false, "its checksum is wrong"};
    return {};
}

} // namespace kvf
