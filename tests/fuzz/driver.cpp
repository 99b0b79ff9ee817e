// Runs a fuzz target without a fuzzer: on inputs made from seeds, or on the files that are named
// (such as those that libFuzzer leaves). KVFERRY_FUZZ_RUNS sets how many inputs; KVFERRY_FUZZ_SEED
// the first.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

namespace {

uint64_t setting(const char *name, uint64_t otherwise) {
    const char *value = std::getenv(name);
    return value ? std::strtoull(value, nullptr, 10) : otherwise;
}

std::vector<uint8_t> make_input(uint64_t seed) {
    std::mt19937_64 random(seed);
    std::vector<uint8_t> input(random() % (uint64_t{1} << (random() % 12)));
    // Small numbers, and now and then any: purely random fields would nearly all be refused at
    // once.
    const uint64_t any_in = 1 + random() % 16;
    for (auto &byte : input) {
        byte = static_cast<uint8_t>(random() % any_in == 0 ? random() : random() % 3);
    }
    return input;
}

} // namespace

int main(int count, char **arguments) {
    for (int i = 1; i < count; ++i) {
        std::ifstream file(arguments[i], std::ios::binary);
        const std::vector<char> text{std::istreambuf_iterator<char>(file), {}};
        const std::vector<uint8_t> input(text.begin(), text.end());
        LLVMFuzzerTestOneInput(input.data(), input.size());
    }
    if (count > 1) return 0;
    const uint64_t first = setting("KVFERRY_FUZZ_SEED", 1);
    const uint64_t runs = setting("KVFERRY_FUZZ_RUNS", 20000);
    for (uint64_t seed = first; seed < first + runs; ++seed) {
        // A copy of exactly its size, so that ASan sees what is read behind it.
        const std::vector<uint8_t> input = make_input(seed);
        const std::vector<uint8_t> exact(input.begin(), input.end());
        LLVMFuzzerTestOneInput(exact.data(), exact.size());
    }
    std::printf("%llu inputs\n", static_cast<unsigned long long>(runs));
}
