// What a cache allows, and so how its sequences are saved and loaded. Every such decision is made
// here.
#pragma once

#include <string>

#include "kvferry.h"
#include "states/formats.h"

namespace kvf {

// A value: it changes as more is seen of the cache's states.
class CachePolicy {
public:
    // What is known of the format of the cache's states.
    enum class Format {
        Unseen, // no state with cells has been seen
        Known,  // a row of formats.cpp describes them
        Opaque, // no row does
    };

    // `window`: of sliding-window layers in tokens, or 0.
    CachePolicy(int32_t window, bool has_recurrent_layers)
        : window_(window), recurs_(has_recurrent_layers) {}

    // What a state says of the parts of the cache. It need not have cells.
    void note_parts(const Structure &structure);
    // The format is known, and the parts that have cells here are.
    void note_cells(const Structure &structure);
    // A state with cells in every part has told everything.
    void note_known(const Structure &structure);
    void note_opaque();

    Format format() const { return format_; }
    bool is_opaque() const { return format_ == Format::Opaque; }
    const std::string &kind() const { return kind_; } // such as "attention+recurrent"
    const std::string &format_name() const { return format_name_; }
    // layout_hash() of the cache's states; "" unless the format is known
    const std::string &layout() const { return layout_; }
    int32_t window() const { return window_; }

    // Decoding a sequence never overwrites its former tokens. Recurrent states are overwritten, and
    // windows as they slide.
    bool appends_only() const { return knows_parts_ && !recurs_ && window_ == 0; }

    // How a save is done that asks for this mode: AUTO is a snapshot where the next decode
    // overwrites what is saved.
    uint32_t save_mode(uint32_t asked) const;
    // Nothing is known of what may be done to the cache during a transfer: the submitting call
    // moves the bytes, of saves and loads.
    bool moves_during_call() const { return is_opaque(); }
    // Each state has an envelope behind it, as nothing else can tell damage.
    bool seals_states() const { return is_opaque(); }
    // Other sequences get cells that a state still has: their bytes must be moved before the
    // submitting call returns.
    bool gives_cells_away() const { return window_ > 0; }
    // The first position of a sequence stays while others are decoded.
    bool keeps_first_position() const { return window_ == 0; }
    // The rows that decoding writes can be told from the graph, where it names them.
    bool tells_rows() const { return has_one_attention_ && window_ == 0; }

    // What may be done by blocks and checkpoints, and in words why not more.
    kvf_blocks_allowed blocks_allowed() const;
    const char *why_not_more_blocks() const;
    // How many of the parts keep every token, and so consist of blocks. They come first.
    size_t parts_in_blocks() const;

    // True if a part has no cells although the sequence has a last position. libllama never writes
    // such a state, except for a window that was emptied: false.
    bool lacks_cells(const Structure &structure) const;

private:
    const char *why_checkpoints() const;

    int32_t window_;
    bool recurs_;
    bool knows_parts_ = false;
    bool knows_blocks_ = false; // states with cells in all parts that blocks hold have been seen
    bool has_one_attention_ = false; // and that is the first part
    size_t attentions_ = 0, parts_ = 0;
    Format format_ = Format::Unseen;
    std::string kind_ = "unknown";
    std::string format_name_ = "unseen";
    std::string layout_;
};

} // namespace kvf
