// Any region list is either refused or moved exactly; sizes agree with a model that cannot
// overflow.
#include <algorithm>
#include <vector>

#include "input.hpp"
#include "kvferry.h"

namespace {

using Wide = unsigned __int128;
constexpr Wide kEnd = UINT64_MAX;

// The size that kvf_regions_size() must give, or -1 if it must refuse.
__int128 model_size(const std::vector<kvf_region> &regions) {
    Wide size = 0;
    for (const auto &r : regions) {
        if (!r.address || !r.width || !r.rows) return -1;
        Wide span = r.width, buffer_span = r.width;
        if (r.rows > 1) {
            if (r.pitch < r.width || r.buffer_pitch < r.width) return -1;
            span += Wide{r.rows - 1} * r.pitch;
            buffer_span += Wide{r.rows - 1} * r.buffer_pitch;
        }
        if (r.address + span > kEnd || r.offset + buffer_span > kEnd) return -1;
        size = std::max(size, r.offset + buffer_span);
    }
    return static_cast<__int128>(size);
}

kvf_engine engine() {
    static const kvf_engine engine = [] {
        kvf_engine_options options = KVF_ENGINE_OPTIONS_INIT;
        options.devices = KVF_DEVICES_HOST;
        options.copy_threads = 1; // regions may overlap in the buffer: one after the other
        kvf_engine made = 0;
        CHECK(kvf_engine_create(&options, &made) == KVF_OK);
        return made;
    }();
    return engine;
}

void wait_for(kvf_job job, uint64_t bytes) {
    kvf_completion completion;
    CHECK(kvf_job_wait(job, KVF_FOREVER, &completion, sizeof completion) == KVF_OK);
    CHECK(completion.status == KVF_OK && completion.bytes == bytes);
    CHECK(kvf_job_release(job) == KVF_OK);
}

// Numbers at which arithmetic goes wrong.
uint64_t edge(Input &input) {
    const uint64_t edges[] = {0, 1, 2, 7, uint64_t{1} << 32, uint64_t{1} << 63, UINT64_MAX};
    const uint64_t which = input.below(9);
    if (which == 7) return UINT64_MAX - input.below(5000);
    return which == 8 ? input.number<uint64_t>() : edges[which];
}

void any_numbers(Input &input) {
    std::vector<kvf_region> regions;
    while (!input.at_end() && regions.size() < 100) {
        kvf_region r{};
        for (uint64_t *field :
             {&r.address, &r.width, &r.rows, &r.pitch, &r.offset, &r.buffer_pitch}) {
            *field = edge(input);
        }
        regions.push_back(r);
        uint64_t bytes = 0;
        const int32_t status = kvf_regions_size(regions.data(), regions.size(), &bytes);
        const __int128 expected = model_size(regions);
        CHECK(status == (expected < 0 ? KVF_ERR_INVALID_ARGUMENT : KVF_OK));
        if (expected < 0) {
            regions.pop_back(); // the good ones stay, and the next is tried behind them
        } else {
            CHECK(bytes == static_cast<uint64_t>(expected));
        }
    }
}

void moved(Input &input) {
    const uint64_t memory_bytes = 1 + input.below(20000);
    std::vector<unsigned char> memory(memory_bytes);
    for (size_t i = 0; i < memory.size(); ++i)
        memory[i] = static_cast<unsigned char>(i * 7 + i / 256);
    std::vector<kvf_region> regions;
    uint64_t bytes = 0, total = 0;
    while (!input.at_end() && regions.size() < 300) {
        const uint64_t at = input.below(memory_bytes);
        kvf_region r{reinterpret_cast<uint64_t>(memory.data()) + at,
                     1 + input.below(300),
                     1 + input.below(12),
                     0,
                     input.below(30000),
                     0};
        r.pitch = r.width + input.below(100);
        r.buffer_pitch = r.width + input.below(100);
        if (at + (r.rows - 1) * r.pitch + r.width > memory_bytes) continue;
        total += r.rows * r.width;
        regions.push_back(r);
    }
    const __int128 size = model_size(regions);
    CHECK(kvf_regions_size(regions.data(), regions.size(), &bytes) == KVF_OK && size == bytes);

    std::vector<unsigned char> buffer(bytes, 0xee), expected(bytes, 0xee);
    // Where regions overlap in the buffer any of them may come last; there, bytes are not compared.
    std::vector<unsigned char> writers(bytes, 0);
    for (const auto &r : regions) {
        for (uint64_t row = 0; row < r.rows; ++row) {
            const auto *from = reinterpret_cast<unsigned char *>(r.address + row * r.pitch);
            for (uint64_t i = 0; i < r.width; ++i) {
                const uint64_t place = r.offset + row * r.buffer_pitch + i;
                expected[place] = from[i];
                writers[place] = std::min(writers[place] + 1, 2);
            }
        }
    }
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.priority = static_cast<uint32_t>(bytes % 2);
    kvf_job job = 0;
    if (bytes) {
        CHECK(kvf_regions_save(engine(), regions.data(), regions.size(), buffer.data(), bytes - 1,
                               &options, &job) == KVF_ERR_BUFFER_TOO_SMALL);
    }
    CHECK(kvf_regions_save(engine(), regions.data(), regions.size(), buffer.data(), bytes, &options,
                           &job) == KVF_OK);
    wait_for(job, total);
    for (uint64_t i = 0; i < bytes; ++i) CHECK(writers[i] == 2 || buffer[i] == expected[i]);

    // Back again: memory does not change, where nothing overlapped.
    if (std::count(writers.begin(), writers.end(), 2) == 0) {
        const std::vector<unsigned char> before(memory);
        CHECK(kvf_regions_load(engine(), regions.data(), regions.size(), buffer.data(), bytes,
                               &options, &job) == KVF_OK);
        wait_for(job, total);
        CHECK(memory == before);
    }
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    Input input(data, size);
    if (input.number<uint8_t>() % 2) {
        any_numbers(input);
    } else {
        moved(input);
    }
    return 0;
}
