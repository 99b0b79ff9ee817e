#include "llama/policy.h"

#include <algorithm>

#include "kvferry.h"

namespace kvf {

void CachePolicy::note_parts(const Structure &structure) {
    const auto is_recurrent = [](const Section &section) {
        return section.kind == Section::Kind::Recurrent;
    };
    knows_parts_ = true;
    kind_ = structure.kind();
    recurs_ |= std::any_of(structure.sections.begin(), structure.sections.end(), is_recurrent);
    has_one_attention_ = structure.has_one_attention_first();
}

void CachePolicy::note_known(const Structure &structure) {
    format_ = Format::Known;
    format_name_ = structure.format->name;
}

void CachePolicy::note_opaque() {
    format_ = Format::Opaque;
    format_name_ = "opaque";
    kind_ = "unknown";
    knows_parts_ = false;
    has_one_attention_ = false;
}

uint32_t CachePolicy::save_mode(uint32_t asked) const {
    if (asked != KVF_SAVE_AUTO) return asked;
    return appends_only() ? KVF_SAVE_IN_PLACE : KVF_SAVE_SNAPSHOT;
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
