// Measures transfers of blocks beside a raw pinned copy of as many bytes: plain device memory
// stands for the cache of an 8B Llama, of which a sequence of 8,192 tokens moves as 32 blocks of 32
// MiB.
//
//     blocks_layouts [--small] [rounds]
//
// With KVFERRY_TEST_GPU=1 in the environment on a real GPU; it takes 4 GiB of its memory and 1 GiB
// of pinned memory. Each line has the medians of the rounds: GB/s, and the share of the raw speed,
//
//     gathered     urgent; small regions are copied together with the gaps between them
//     plain        urgent; each region is copied by itself, as for regions of a program's own
//     background   gathered and paced
//
// and the milliseconds from submission to completion for the last block alone (gathered), and of
// the submitting call for all blocks. Ends with 1 where a byte is wrong.
#include <cstring>

#include "cuda/blocks.hpp"
#include "cuda/inside.hpp"

namespace {

constexpr uint64_t kPage = 4096;

double now_ms() { return static_cast<double>(kvf::now_ns()) / 1e6; }

double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

struct Bench {
    std::shared_ptr<kvf::Engine> engine = make_cuda_engine();
    Blocks blocks;
    uint64_t rounds;
    uint64_t distance = (blocks.buffer_bytes() + kPage - 1) / kPage * kPage; // between blocks
    uint64_t buffer_bytes = blocks.count * distance;
    DeviceMemory cache{blocks.device_bytes()};
    unsigned char *buffer = static_cast<unsigned char *>(engine->pool().alloc(buffer_bytes));
    Bytes content{};

    kvf::Recorded record(uint64_t first, uint64_t last, bool owns_gaps) const {
        kvf::Recorded recorded;
        for (uint64_t i = first; i < last; ++i) {
            recorded.layouts.emplace_back(
                1, blocks.layout(i, cache.address(), i * distance, owns_gaps));
        }
        return recorded;
    }

    struct Times {
        double all_ms, submit_ms;
    };
    Times move(Way way, const kvf::Recorded &what, uint32_t priority) const {
        kvf::Recorded recorded = what;
        const double begin = now_ms();
        const auto job = kvf::submit_job(*engine, make_submission(way, buffer, buffer_bytes),
                                         std::move(recorded), options_of(priority), nullptr);
        const double submitted = now_ms();
        succeed(job);
        return {now_ms() - begin, submitted - begin};
    }

    double raw(Way way, const Stream &stream) const {
        const Driver &d = driver();
        const uint64_t bytes = blocks.bytes();
        const double begin = now_ms();
        if (way == Way::Save) {
            CHECK_CUDA(d.cuMemcpyDtoHAsync(buffer, cache.address(), bytes, stream.get()));
        } else {
            CHECK_CUDA(d.cuMemcpyHtoDAsync(cache.address(), buffer, bytes, stream.get()));
        }
        stream.synchronize();
        return now_ms() - begin;
    }

    // Loads random bytes, looks at some of them on the device, and saves them again.
    void check(bool owns_gaps) {
        const kvf::Recorded all = record(0, blocks.count, owns_gaps);
        std::copy(content.begin(), content.end(), buffer);
        move(Way::Load, all, KVF_PRIORITY_URGENT);
        CHECK(memcmp(buffer, content.data(), content.size()) == 0);
        uint64_t count = 0;
        for_each_fragment([&](uint64_t address, uint64_t offset, uint64_t bytes) {
            if (count++ % 1009 == 0) {
                Bytes there(bytes);
                cache.read(there, address - cache.address());
                CHECK(memcmp(there.data(), &content[offset], bytes) == 0);
            }
            memset(buffer + offset, 0, bytes);
        });
        move(Way::Save, all, KVF_PRIORITY_URGENT);
        CHECK(memcmp(buffer, content.data(), content.size()) == 0);
    }

    template <class Function>
    void for_each_fragment(Function &&function) const {
        for (uint64_t i = 0; i < blocks.count; ++i) {
            blocks.for_each_fragment(
                i, cache.address(), [] {},
                [&](uint64_t address, uint64_t offset, uint64_t bytes) {
                    function(address, i * distance + offset, bytes);
                });
        }
    }

    void measure(const char *name, Way way) const {
        const kvf::Recorded gathered = record(0, blocks.count, true);
        const kvf::Recorded plain = record(0, blocks.count, false);
        const kvf::Recorded last = record(blocks.count - 1, blocks.count, true);
        const Stream stream;
        std::vector<double> raw_ms, gathered_ms, plain_ms, background_ms, last_ms, submit_ms;
        raw(way, stream); // warms up
        for (uint64_t round = 0; round < rounds; ++round) {
            raw_ms.push_back(raw(way, stream));
            const Times times = move(way, gathered, KVF_PRIORITY_URGENT);
            gathered_ms.push_back(times.all_ms);
            submit_ms.push_back(times.submit_ms);
            plain_ms.push_back(move(way, plain, KVF_PRIORITY_URGENT).all_ms);
            background_ms.push_back(move(way, gathered, KVF_PRIORITY_BACKGROUND).all_ms);
            last_ms.push_back(move(way, last, KVF_PRIORITY_URGENT).all_ms);
        }
        const double raw_median = median(raw_ms);
        const auto show = [&](const std::vector<double> &ms) {
            printf("  %6.1f %5.3f", static_cast<double>(blocks.bytes()) / 1e6 / median(ms),
                   raw_median / median(ms));
        };
        printf("%-13s %-4s", name, way == Way::Save ? "save" : "load");
        for (const auto *ms : {&raw_ms, &gathered_ms, &plain_ms, &background_ms}) show(*ms);
        printf("  %8.3f %8.3f\n", median(last_ms), median(submit_ms));
    }

    ~Bench() {
        kvf_buffer_free(buffer);
        engine->close();
    }
};

} // namespace

int main(int argc, char **argv) {
    const bool is_small = argc > 1 && strcmp(argv[1], "--small") == 0;
    const char *const given = argc > 1 + is_small ? argv[1 + is_small] : nullptr;
    const uint64_t rounds = given ? strtoull(given, nullptr, 10) : is_small ? 1 : 9;
    const Context context;
    Random random(1);
    printf("%-13s %-4s  %12s  %12s  %12s  %12s  %8s %8s\n", "GB/s, of raw", "", "raw", "gathered",
           "plain", "background", "one, ms", "call, ms");
    for (const auto &[name, cells] :
         {std::pair("contiguous", Cells::Contiguous), std::pair("in turn", Cells::InTurn),
          std::pair("V transposed", Cells::Transposed), std::pair("at random", Cells::AtRandom)}) {
        Bench bench{.blocks =
                        is_small ? Blocks{cells, 2, 8, 64, 512} : Blocks{cells, 32, 64, 256, 2048},
                    .rounds = rounds};
        bench.content = random_bytes(random, bench.buffer_bytes);
        for (const bool owns_gaps : {true, false}) bench.check(owns_gaps);
        for (const Way way : {Way::Save, Way::Load}) bench.measure(name, way);
        fflush(stdout);
    }
    return 0;
}
