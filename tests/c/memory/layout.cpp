// How recorded fragments become few regions, and regions become pieces. (Random ones:
// fuzz/layout.cpp.)
#include "memory/layout_builder.h"
#include "memory/pieces.h"

#include "check.hpp"
#include "coverage.hpp"

using namespace kvf;

namespace {

constexpr uint64_t kBase = 0x7f0000000000; // never read

Layout of_fragments(const std::vector<Run> &fragments) {
    LayoutBuilder builder;
    for (const auto &f : fragments) builder.add(f.address, f.offset, f.bytes);
    CHECK(builder.fragments() == fragments.size());
    return builder.finish();
}

Coverage coverage(const Layout &layout, uint64_t most, uint64_t most_runs) {
    Coverage result;
    Cursor cursor(layout);
    while (!cursor.at_end()) {
        const Piece piece = cursor.next(most, most_runs);
        CHECK(piece.bytes > 0 && (piece.bytes <= most || piece.count == 1));
        CHECK(piece.count <= most_runs);
        result.add(piece);
    }
    return result;
}

void check_moves_the_same(const std::vector<Run> &fragments, const Layout &layout) {
    Coverage expected;
    for (const auto &f : fragments) expected.add(f.address, f.offset, f.bytes);
    CHECK(layout.bytes == expected.bytes());
    for (const uint64_t most : {1u, 7u, 64u, 4096u, 1u << 20, 1u << 30}) {
        if (expected.bytes() / most > 1 << 16) continue;
        CHECK(coverage(layout, most, 3) == expected);
        CHECK(coverage(layout, most, 1 << 20) == expected);
    }
}

Layout check(const std::vector<Run> &fragments, size_t blocks, size_t runs) {
    Layout layout = of_fragments(fragments);
    check_moves_the_same(fragments, layout);
    CHECK(layout.regions.size() == blocks);
    CHECK(runs_of(layout) == runs);
    return layout;
}

void nothing() {
    const Layout layout = check({}, 0, 0);
    CHECK(layout.empty() && layout.segments() == 0);
    CHECK(Cursor(layout).at_end());
}

void neighbours_become_one_run() {
    std::vector<Run> fragments;
    for (uint64_t i = 0; i < 1000; ++i) fragments.push_back({kBase + i * 256, i * 256, 256});
    const Layout layout = check(fragments, 1, 0);
    CHECK(layout.regions[0].rows == 1 && layout.regions[0].width == 256000);
    // Neighbours of unequal sizes too.
    check({{kBase, 0, 100}, {kBase + 100, 100, 70000}, {kBase + 70100, 70100, 1}}, 1, 0);
    // Neighbours in memory alone, or in the buffer alone, are none.
    check({{kBase, 0, 100}, {kBase + 100, 101, 30}}, 0, 2);
    check({{kBase, 0, 100}, {kBase + 101, 100, 30}}, 0, 2);
}

void rows_become_one_block() {
    std::vector<Run> fragments;
    for (uint64_t i = 0; i < 100000; ++i)
        fragments.push_back({kBase + i * 8192, 7 + i * 2048, 2048});
    const Layout layout = check(fragments, 1, 0);
    CHECK(layout.regions[0].rows == 100000 && layout.regions[0].pitch == 8192);
    CHECK(layout.regions[0].buffer_pitch == 2048 && layout.regions[0].offset == 7);
}

void a_few_rows_stay_runs() {
    std::vector<Run> fragments;
    for (uint64_t i = 0; i < kFewRows - 1; ++i)
        fragments.push_back({kBase + i * 1000, i * 100, 100});
    check(fragments, 0, kFewRows - 1);
    fragments.push_back({kBase + (kFewRows - 1) * 1000, (kFewRows - 1) * 100, 100});
    check(fragments, 1, 0);
}

void a_long_run_stays_whole() {
    check({{kBase, 0, kLongRun}}, 1, 0);
    check({{kBase, 0, kLongRun}, {kBase + 10 * kLongRun, kLongRun, kLongRun + 1}}, 2, 0);
    check({{kBase, 0, kLongRun}, {kBase + 10 * kLongRun, kLongRun, kLongRun}}, 1, 0); // two rows
    check({{kBase, 0, kLongRun - 1}}, 0, 1);
}

// A run of cells, then one far away, then the next run: rows must not be paired across the gap.
void periods_do_not_pair_wrongly() {
    std::vector<Run> fragments;
    uint64_t offset = 0;
    for (uint64_t layer = 0; layer < 20; ++layer) {
        for (uint64_t row = 0; row < 64; ++row, offset += 128) {
            fragments.push_back({kBase + layer * 1000000 + row * 512, offset, 128});
        }
    }
    CHECK(of_fragments(fragments).regions.size() == 20);
    check_moves_the_same(fragments, of_fragments(fragments));
}

void rows_that_go_backwards() {
    std::vector<Run> fragments;
    for (uint64_t i = 0; i < 50; ++i) fragments.push_back({kBase + (50 - i) * 1000, i * 100, 100});
    check(fragments, 0, 50);
}

void the_same_bytes_twice() {
    check({{kBase, 0, 100}, {kBase, 0, 100}, {kBase, 100, 100}, {kBase, 200, 100}}, 0, 4);
}

void regions() {
    LayoutBuilder builder;
    const kvf_region block{kBase, 100, 50, 300, 0, 100};
    const kvf_region few{kBase + 100000, 100, 3, 300, 5000, 200};
    const kvf_region plain{kBase + 200000, 100, 1, ~0ull, 6000, ~0ull};
    const kvf_region dense{kBase + 300000, 100, 4, 100, 7000, 100};
    Coverage expected;
    for (const auto &region : {block, few, dense}) {
        builder.add(region);
        expected.add(region);
    }
    builder.add(plain);
    expected.add(plain.address, plain.offset, plain.width);
    CHECK(builder.fragments() == 50 + 3 + 1 + 1);
    const Layout layout = builder.finish();
    CHECK(layout.bytes == expected.bytes());
    for (const uint64_t most : {1u, 99u, 100u, 250u, 100000u}) {
        CHECK(coverage(layout, most, 2) == expected);
    }
}

// Neither runs nor rows; and a table holds the irregular rest of all of them.
void nothing_joins_across_allocations() {
    const auto of_allocations = [](uint64_t width, uint64_t pitch, uint64_t rows) {
        LayoutBuilder builder;
        Coverage expected;
        for (uint64_t i = 0; i < 3 * rows; ++i) {
            const uint64_t address = kBase + i * pitch;
            if (i % rows == 0) builder.begin_allocation();
            builder.add(address, i * width, width);
            expected.add(address, i * width, width);
        }
        Layout layout = builder.finish();
        CHECK(coverage(layout, 1 << 30, 1 << 30) == expected);
        return layout;
    };
    CHECK(of_allocations(kLongRun, kLongRun, 5).regions.size() == 3);
    const Layout rows = of_allocations(2048, 8192, 100);
    CHECK(rows.regions.size() == 3 && rows.regions[1].rows == 100);
    const Layout few = of_allocations(2048, 8192, kFewRows - 1);
    CHECK(few.regions.empty() && few.spans.size() == 1 && runs_of(few) == 3 * (kFewRows - 1));
    const Layout neighbours = of_allocations(100, 100, 10);
    CHECK(neighbours.regions.empty() && runs_of(neighbours) == 3);
}

// The fragments of one tensor of `cells` cells at random places, the same ones for the same seed.
std::vector<Run> random_tensor(uint64_t address, uint64_t offset, uint64_t cells, uint64_t seed) {
    std::vector<Run> fragments;
    for (uint64_t i = 0; i < cells; ++i) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        address += 64 * (1 + (seed >> 33) % 5);
        fragments.push_back({address, offset + i * 64, 64});
        address += 64;
    }
    return fragments;
}

// Builds a layout of tensors, and checks that it moves what they consist of.
Layout of_tensors(const std::vector<std::vector<Run>> &tensors) {
    LayoutBuilder builder;
    Coverage expected;
    for (const auto &tensor : tensors) {
        builder.begin_tensor();
        for (const Run &run : tensor) {
            builder.add(run.address, run.offset, run.bytes);
            expected.add(run.address, run.offset, run.bytes);
        }
    }
    Layout layout = builder.finish();
    CHECK(coverage(layout, 1000, 7) == expected);
    CHECK(coverage(layout, 1 << 30, 1 << 30) == expected);
    return layout;
}

void tensors_that_are_fragmented_alike_share_the_table() {
    std::vector<std::vector<Run>> tensors;
    for (uint64_t i = 0; i < 30; ++i) {
        tensors.push_back(random_tensor(kBase + i * 10000000, i * 64012, 1000, 1));
    }
    const Layout layout = of_tensors(tensors);
    CHECK(layout.spans.size() == 30 && runs_of(layout) <= 1000);
    CHECK(layout.segments() == 30 * runs_of(layout));
}

void a_table_knows_whether_it_is_packed() {
    const auto is_packed = [](const std::vector<Run> &fragments) {
        return of_fragments(fragments).spans[0].table->packed;
    };
    CHECK(is_packed({{kBase, 5, 10}}));
    CHECK(is_packed({{kBase + 100, 5, 10}, {kBase, 15, 1}, {kBase + 50, 16, 3}}));
    CHECK(!is_packed({{kBase, 5, 10}, {kBase + 50, 16, 1}}));
    CHECK(!is_packed({{kBase, 15, 10}, {kBase + 50, 5, 10}}));
    // Two runs of the same bytes in the buffer, whose sum looks as if they were packed.
    CHECK(!is_packed({{kBase, 0, 10}, {kBase + 50, 5, 5}, {kBase + 100, 15, 5}}));
}

void tensors_that_differ_have_runs_of_their_own() {
    const auto one = random_tensor(kBase, 0, 500, 1);
    auto late = random_tensor(kBase + 10000000, 50000, 500, 1); // as `one`, but for its end
    late.back().address += 64;
    auto shorter = random_tensor(kBase + 20000000, 100000, 400, 1);
    auto longer = random_tensor(kBase + 30000000, 150000, 600, 1);
    const auto other = random_tensor(kBase + 40000000, 200000, 500, 2);
    of_tensors({one, late, shorter, longer, other, one});
    of_tensors({one, shorter, {}, one});
}

// What is taken between tensors, and the rest, move together what would have been moved at once;
// and tensors that come after still find the table of one that was taken before.
void a_layout_can_be_taken_in_parts() {
    LayoutBuilder builder;
    Coverage expected, moved;
    std::vector<Layout> parts;
    for (uint64_t i = 0; i < 10; ++i) {
        for (const Run &run : random_tensor(kBase + i * 10000000, i * 64012, 1000, 1)) {
            builder.add(run.address, run.offset, run.bytes);
            expected.add(run.address, run.offset, run.bytes);
        }
        builder.begin_tensor();
        CHECK(builder.bytes() == (i % 2 + 1) * 64000);
        if (i % 2) parts.push_back(builder.take());
    }
    CHECK(builder.bytes() == 0);
    CHECK(builder.finish().empty());
    CHECK(builder.fragments() == 10000);
    for (const Layout &part : parts) {
        CHECK(part.bytes == 128000 && part.spans.size() == 2);
        for (const Span &span : part.spans) CHECK(span.table == parts[0].spans[0].table);
        for (Cursor cursor(part); !cursor.at_end();) moved.add(cursor.next(1000, 7));
    }
    CHECK(moved == expected);
}

Layout of_one_run(uint64_t address, uint64_t bytes) {
    return of_fragments({{address, address - kBase, bytes}});
}

void parts_are_handed_out_as_they_come() {
    Parts parts;
    CHECK(parts.empty() && !parts.at_end());
    parts.add(of_one_run(kBase, kLongRun));
    parts.add(Layout{}); // nothing is no part
    CHECK(!parts.empty());
    CHECK(parts.next(kLongRun - 1, 1).bytes == kLongRun - 1 && !parts.empty());
    CHECK(parts.next(kLongRun, 1).bytes == 1 && parts.empty() && !parts.at_end());
    parts.add(of_one_run(kBase + 2 * kLongRun, 5));
    parts.add(of_one_run(kBase + 3 * kLongRun, kLongRun + 1));
    const Piece small = parts.next(kLongRun, 1);
    CHECK(small.runs && small.run(0).address == kBase + 2 * kLongRun);
    parts.close();
    CHECK(!parts.empty() && parts.region()->width == kLongRun + 1);
    CHECK(parts.next(~0ull, 1).bytes == kLongRun + 1);
    CHECK(parts.at_end() && parts.bytes() == 2 * kLongRun + 6);
    CHECK(small.run(0).bytes == 5); // it is still there
}

void parts_can_be_cut_short() {
    Parts parts;
    parts.add(of_one_run(kBase, kLongRun));
    parts.add(of_one_run(kBase + 2 * kLongRun, kLongRun));
    CHECK(parts.next(1000, 1).bytes == 1000);
    parts.cut_short();
    CHECK(parts.at_end());
    parts.add(of_one_run(kBase + 4 * kLongRun, kLongRun)); // whoever records has not noticed yet
    CHECK(parts.at_end());
}

} // namespace

int main() {
    nothing();
    neighbours_become_one_run();
    rows_become_one_block();
    a_few_rows_stay_runs();
    a_long_run_stays_whole();
    periods_do_not_pair_wrongly();
    rows_that_go_backwards();
    the_same_bytes_twice();
    regions();
    nothing_joins_across_allocations();
    tensors_that_are_fragmented_alike_share_the_table();
    a_table_knows_whether_it_is_packed();
    tensors_that_differ_have_runs_of_their_own();
    a_layout_can_be_taken_in_parts();
    parts_are_handed_out_as_they_come();
    parts_can_be_cut_short();
}
