// The layout of a state becomes layouts of the blocks that hold its bytes.
#pragma once

#include "engine/submission.h"
#include "states/block_map.h"

namespace kvf {

// Cuts regions of rows and tables of runs as a whole where it can: a sequence that was decoded in
// turn with others has half a million rows, which lie in some thousand regions of blocks.
class Spreader {
public:
    // `places`: where each part begins, in the buffer or in device memory that it is staged in.
    Spreader(BlockMap map, std::vector<uint64_t> places)
        : map_(std::move(map)), places_(std::move(places)) {}

    // A layout for each part, in the order of the parts.
    std::vector<Layout> spread(const Layout &layout);
    // The same for several devices. The bytes between the rows of a block are the job's own, where
    // one device has all rows. Leaves out layouts without bytes.
    Layouts spread(const Layouts &layouts);

private:
    // A part's share of a span.
    struct Share {
        size_t part;
        Layout layout;
    };
    // A span that was cut. The tensors of a cache are fragmented alike, so that the next tensors
    // have the same shares, moved.
    struct CutSpan {
        Span span;
        std::vector<Share> shares;
    };

    std::vector<Layout> cut(const std::vector<kvf_region> &regions);
    std::vector<Share> cut(const Span &span);
    const CutSpan &find_or_cut(const Span &span, std::vector<CutSpan> &known);

    BlockMap map_;
    const std::vector<uint64_t> places_;
};

} // namespace kvf
