// Turns the layout of a state into layouts of the blocks that hold the state's bytes.
#pragma once

#include "engine/submission.h"
#include "states/block_map.h"

namespace kvf {

// Cuts regions of rows and tables of runs as a whole where this is possible. (A sequence that was
// decoded in turn with others has half a million rows, in some thousand regions of blocks.)
class Spreader {
public:
    // `places` says where each part begins: in the buffer, or in the device memory where the parts
    // are staged.
    Spreader(BlockMap map, std::vector<uint64_t> places)
        : map_(std::move(map)), places_(std::move(places)) {}

    // Returns a layout for each part, in the order of the parts.
    std::vector<Layout> spread(const Layout &layout);
    // The same for several devices. If one device has all rows of a block, the bytes between these
    // rows are the job's own (Layout::owns_gaps). Leaves out layouts without bytes.
    Layouts spread(const Layouts &layouts);

private:
    // A part's share of a span.
    struct Share {
        size_t part;
        Layout layout;
    };
    // A span that was cut. The tensors of a cache are fragmented in the same way, so the next
    // tensors have the same shares at other places.
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
