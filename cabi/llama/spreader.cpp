#include "llama/spreader.h"

#include <utility>

#include "memory/layout_builder.h"

namespace kvf {
namespace {

// place_of(): where the span's runs begin in the buffer. extent_of(): from there to their end.
uint64_t place_of(const Span &span) {
    return span.table->runs.front().offset + span.offset_distance;
}
uint64_t extent_of(const Span &span) {
    const Run &last = span.table->runs[span.count - 1];
    return last.offset + last.bytes - span.table->runs.front().offset;
}

void append_moved(Layout &to, const Layout &layout, uint64_t address_distance,
                  uint64_t offset_distance) {
    for (kvf_region region : layout.regions) {
        region.address += address_distance;
        region.offset += offset_distance;
        to.regions.push_back(region);
    }
    for (Span span : layout.spans) {
        span.address_distance += address_distance;
        span.offset_distance += offset_distance;
        to.spans.push_back(std::move(span));
    }
    to.bytes += layout.bytes;
}

// Sorts regions and spans in the order of the buffer, which Layout::owns_gaps requires.
void sort_by_offset(Layout &layout) {
    std::sort(layout.regions.begin(), layout.regions.end(),
              [](const kvf_region &a, const kvf_region &b) { return a.offset < b.offset; });
    std::sort(layout.spans.begin(), layout.spans.end(),
              [](const Span &a, const Span &b) { return place_of(a) < place_of(b); });
}

} // namespace

std::vector<Layout> Spreader::spread(const Layout &layout) {
    std::vector<Layout> parts = cut(layout.regions);
    std::vector<CutSpan> known;
    for (const Span &span : layout.spans) {
        const CutSpan &like = find_or_cut(span, known);
        for (const auto &[part, share] : like.shares) {
            append_moved(parts[part], share, span.address_distance - like.span.address_distance,
                         map_.distance(part, place_of(like.span), place_of(span)));
        }
    }
    for (Layout &part : parts) sort_by_offset(part);
    return parts;
}

Layouts Spreader::spread(const Layouts &layouts) {
    Layouts result;
    for (const auto &[device, layout] : layouts) {
        uint32_t block = 0;
        for (Layout &part : spread(layout)) {
            part.owns_gaps = layouts.size() == 1;
            part.block = block++;
            if (!part.empty()) result.emplace_back(device, std::move(part));
        }
    }
    return result;
}

std::vector<Layout> Spreader::cut(const std::vector<kvf_region> &regions) {
    std::vector<LayoutBuilder> builders(places_.size());
    // By part: the tensor whose rows were added last.
    std::vector<size_t> tensors(places_.size(), SIZE_MAX);
    for (const kvf_region &region : regions) {
        const uint64_t pitch = region.rows == 1 ? region.width : region.buffer_pitch;
        map_.for_each_rows(
            {region.offset, region.width, region.rows, pitch},
            [&](size_t part, uint64_t offset, const BlockMap::Rows &rows, uint64_t pitch_in_part) {
                const uint64_t distance = rows.place - region.offset;
                const uint64_t address =
                    region.address + distance / pitch * region.pitch + distance % pitch;
                if (std::exchange(tensors[part], map_.tensor()) != map_.tensor())
                    builders[part].begin_tensor();
                builders[part].add({address, rows.width, rows.rows, region.pitch,
                                    places_[part] + offset, pitch_in_part});
            });
    }
    std::vector<Layout> parts;
    parts.reserve(builders.size());
    for (LayoutBuilder &builder : builders) parts.push_back(builder.finish());
    return parts;
}

const Spreader::CutSpan &Spreader::find_or_cut(const Span &span, std::vector<CutSpan> &known) {
    for (const CutSpan &like : known) {
        if (like.span.table == span.table && like.span.count == span.count &&
            map_.are_alike(place_of(like.span), place_of(span), extent_of(span)))
            return like;
    }
    return known.emplace_back(span, cut(span));
}

std::vector<Spreader::Share> Spreader::cut(const Span &span) {
    std::vector<LayoutBuilder> builders(places_.size());
    for (uint64_t i = 0; i < span.count; ++i) {
        const Run &run = span.table->runs[i];
        const uint64_t address = run.address + span.address_distance;
        map_.for_each(run.offset + span.offset_distance, run.bytes,
                      [&](size_t part, uint64_t offset, uint64_t place, uint64_t bytes) {
                          const uint64_t column = place - (run.offset + span.offset_distance);
                          builders[part].add(address + column, places_[part] + offset, bytes);
                      });
    }
    std::vector<Share> shares;
    for (size_t part = 0; part < builders.size(); ++part) {
        Layout layout = builders[part].finish();
        if (!layout.empty()) shares.push_back({part, std::move(layout)});
    }
    return shares;
}

} // namespace kvf
