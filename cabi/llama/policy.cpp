#include "llama/policy.h"

#include <algorithm>

namespace kvf {

void CachePolicy::note_parts(const Structure &structure) {
    const auto is_recurrent = [](const Section &section) {
        return section.kind == Section::Kind::Recurrent;
    };
    knows_parts_ = true;
    kind_ = structure.kind();
    recurs_ |= std::any_of(structure.sections.begin(), structure.sections.end(), is_recurrent);
    has_one_attention_ = structure.has_one_attention_first();
    parts_ = structure.sections.size();
    attentions_ = parts_ - static_cast<size_t>(std::count_if(
                               structure.sections.begin(), structure.sections.end(), is_recurrent));
}

void CachePolicy::note_cells(const Structure &structure) {
    const size_t parts = parts_in_blocks();
    const auto begin = structure.sections.begin();
    knows_blocks_ = parts > 0 && std::all_of(begin, begin + static_cast<ptrdiff_t>(parts),
                                             [](const Section &section) { return section.cells; });
}

void CachePolicy::note_known(const Structure &structure) {
    format_ = Format::Known;
    format_name_ = structure.format->name;
    layout_ = layout_hash(structure);
}

void CachePolicy::note_opaque() {
    format_ = Format::Opaque;
    format_name_ = "opaque";
    layout_.clear();
    kind_ = "unknown";
    knows_parts_ = false;
    knows_blocks_ = false;
    has_one_attention_ = false;
}

uint32_t CachePolicy::save_mode(uint32_t asked) const {
    if (asked != KVF_SAVE_AUTO) return asked;
    return appends_only() ? KVF_SAVE_IN_PLACE : KVF_SAVE_SNAPSHOT;
}

size_t CachePolicy::parts_in_blocks() const {
    if (format_ == Format::Opaque) return 0;
    // Of several attention parts the last is the window's.
    return window_ > 0 && attentions_ > 0 ? attentions_ - 1 : attentions_;
}

kvf_blocks_allowed CachePolicy::blocks_allowed() const {
    if (format_ == Format::Unseen && !knows_blocks_) return KVF_BLOCKS_UNSEEN;
    if (format_ == Format::Opaque) return KVF_BLOCKS_NONE;
    if (attentions_ == 0) return KVF_BLOCKS_CHECKPOINTS_ALONE;
    if (parts_in_blocks() == 0) return KVF_BLOCKS_NONE;
    return parts_in_blocks() == parts_ ? KVF_BLOCKS_ALONE : KVF_BLOCKS_WITH_CHECKPOINTS;
}

const char *CachePolicy::why_checkpoints() const {
    if (!recurs_) return "some layers have a sliding window";
    if (window_ > 0) return "some layers are recurrent or have a sliding window";
    return "some layers are recurrent";
}

const char *CachePolicy::why_not_more_blocks() const {
    switch (blocks_allowed()) {
    case KVF_BLOCKS_UNSEEN: return "no sequence of the context has had cells yet";
    case KVF_BLOCKS_NONE:
        return format_ == Format::Opaque
                   ? "the format of this cache's states is not known to kvferry"
                   : "every layer has a sliding window, in one part of the cache";
    case KVF_BLOCKS_CHECKPOINTS_ALONE: return "every layer is recurrent, and keeps no tokens";
    case KVF_BLOCKS_WITH_CHECKPOINTS: return why_checkpoints();
    case KVF_BLOCKS_ALONE: break;
    }
    return "";
}

bool CachePolicy::lacks_cells(const Structure &structure) const {
    bool first = true;
    for (const Section &section : structure.sections) {
        const bool may_be_empty = !first && section.kind == Section::Kind::Attention && window_ > 0;
        if (section.cells == 0 && !may_be_empty) return true;
        first = false;
    }
    return false;
}

} // namespace kvf
