// Any order of fragments and regions, cut into any pieces, moves exactly the bytes that were added.
#include "memory/layout_builder.h"
#include "memory/pieces.h"

#include <vector>

#include "coverage.hpp"
#include "input.hpp"

using namespace kvf;

namespace {

struct Model {
    LayoutBuilder builder;
    Coverage coverage;
    std::vector<Run> tensor; // its fragments so far
    uint64_t fragments = 0;
    std::vector<Layout> taken;

    void begin_tensor(bool take) {
        builder.begin_tensor();
        tensor.clear();
        if (take) taken.push_back(builder.take());
    }
    void add(uint64_t address, uint64_t offset, uint64_t bytes) {
        builder.add(address, offset, bytes);
        coverage.add(address, offset, bytes);
        tensor.push_back({address, offset, bytes});
        ++fragments;
    }
    void add(const kvf_region &region) {
        builder.add(region);
        coverage.add(region);
        const bool one_run = region.pitch == region.width && region.buffer_pitch == region.width;
        fragments += one_run ? 1 : region.rows;
    }
};

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    Input input(data, size);
    const uint64_t widths[] = {1, 2, 64, 100, 2048, 40000, kLongRun - 1, kLongRun, 3 * kLongRun};
    Model model;
    uint64_t address = uint64_t{1} << 40, offset = 0;

    while (!input.at_end() && model.fragments < 2000) {
        const uint64_t width = widths[input.below(9)];
        switch (input.below(8)) {
        case 0: address += input.below(5000); break;
        case 1: address -= input.below(5000); break;
        case 2: offset += input.below(100); break;
        case 3: offset = input.below(100000); break;
        default: break; // a neighbour
        }
        switch (input.below(8)) {
        case 0:
            if (input.below(2)) {
                model.begin_tensor(input.below(2));
            } else {
                model.builder.begin_allocation();
            }
            break;
        case 1: { // another tensor, fragmented as the last one, or nearly so
            const std::vector<Run> last = model.tensor;
            if (input.below(4)) model.begin_tensor(input.below(4) == 0);
            const uint64_t distance = input.number<uint16_t>();
            const uint64_t odd_one = input.below(30), most = input.below(200);
            for (size_t i = 0; i < last.size() && i < most; ++i) {
                model.add(last[i].address + distance, last[i].offset + offset,
                          last[i].bytes + (i == odd_one));
            }
            break;
        }
        case 2: {
            const kvf_region region{address,
                                    width,
                                    1 + input.below(20),
                                    width + input.below(3) * 64,
                                    offset,
                                    width + input.below(3) * 32};
            model.add(region);
            address += region.rows * region.pitch;
            offset += region.rows * region.buffer_pitch;
            break;
        }
        default: // rows at a pitch, as a tensor's fragments come
            const uint64_t pitch = width + input.below(3) * width;
            for (uint64_t rows = 1 + input.below(12); rows > 0; --rows) {
                model.add(address, offset, width);
                address += pitch;
                offset += width;
            }
        }
    }
    LayoutBuilder &builder = model.builder;
    const Coverage &expected = model.coverage;
    const uint64_t fragments = model.fragments;

    CHECK(builder.fragments() == fragments);
    model.taken.push_back(builder.finish());

    const uint64_t mosts[] = {777, 4096, 100000, uint64_t{4} << 20};
    const uint64_t most = mosts[size % 4];
    const uint64_t most_runs = 1 + size % 50;
    Coverage moved;
    uint64_t segments = 0, bytes = 0;
    for (const Layout &layout : model.taken) {
        segments += layout.segments();
        bytes += layout.bytes;
        for (const auto &block : layout.regions)
            CHECK(block.rows >= kFewRows || block.width >= kLongRun);
        for (const auto &span : layout.spans)
            for (const auto &run : span.table->runs) CHECK(run.bytes < kLongRun);
        Cursor cursor(layout);
        for (bool at_runs = false; !cursor.at_end();) {
            const Piece piece = cursor.next(most, most_runs);
            CHECK(piece.runs || !at_runs); // the irregular rest comes last
            at_runs = piece.runs != nullptr;
            CHECK(piece.bytes > 0 && (piece.bytes <= most || (at_runs && piece.count == 1)));
            CHECK(piece.count <= most_runs);
            moved.add(piece);
        }
    }
    CHECK(bytes == expected.bytes());
    CHECK(segments <= fragments);
    CHECK(moved == expected);
    return 0;
}
