#include "llama/relocation.h"

#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "core/status.h"

namespace kvf {

// The tables of one loaded object that say where its slots are.
struct RelocationSlots::ObjectTables {
    const ElfW(Sym) *symbols = nullptr;
    const char *strings = nullptr;
    struct {
        const ElfW(Rela) * entries;
        size_t count;
    } relocations[2]{};
    uint64_t base = 0;
    uint64_t begin = UINT64_MAX, end = 0; // of its loaded segments
    uint64_t relro_begin = 0, relro_end = 0;
};

namespace {

#if defined(__x86_64__)
constexpr uint32_t kSlotTypes[] = {R_X86_64_JUMP_SLOT, R_X86_64_GLOB_DAT};
#elif defined(__aarch64__)
constexpr uint32_t kSlotTypes[] = {R_AARCH64_JUMP_SLOT, R_AARCH64_GLOB_DAT};
#else
#error "the tap knows x86-64 and 64-bit Arm"
#endif

uint64_t page_of(uint64_t address) {
    const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    return address / page * page;
}

template <class Tables>
bool read_tables(uint64_t base, Tables &tables) {
    tables.base = base;
    const auto visit = [](dl_phdr_info *info, size_t, void *data) -> int {
        auto &t = *static_cast<Tables *>(data);
        if (info->dlpi_addr != t.base) return 0;
        const ElfW(Dyn) *dynamic = nullptr;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto &segment = info->dlpi_phdr[i];
            if (segment.p_type == PT_DYNAMIC) {
                dynamic = reinterpret_cast<const ElfW(Dyn) *>(t.base + segment.p_vaddr);
            } else if (segment.p_type == PT_LOAD) {
                const uint64_t begin = t.base + segment.p_vaddr;
                t.begin = std::min(t.begin, begin);
                t.end = std::max(t.end, begin + segment.p_memsz);
            } else if (segment.p_type == PT_GNU_RELRO) {
                // In whole pages, as the loader protects them: what shares the last one with data
                // is not.
                t.relro_begin = page_of(t.base + segment.p_vaddr);
                t.relro_end = page_of(t.base + segment.p_vaddr + segment.p_memsz);
            }
        }
        if (!dynamic) return 1;
        // glibc has already added the base to these addresses; other loaders have not.
        const auto at = [&](uint64_t value) { return value < t.base ? t.base + value : value; };
        for (; dynamic->d_tag != DT_NULL; ++dynamic) {
            const uint64_t value = dynamic->d_un.d_val;
            switch (dynamic->d_tag) {
            case DT_SYMTAB: t.symbols = reinterpret_cast<const ElfW(Sym) *>(at(value)); break;
            case DT_STRTAB: t.strings = reinterpret_cast<const char *>(at(value)); break;
            case DT_JMPREL:
                t.relocations[0].entries = reinterpret_cast<const ElfW(Rela) *>(at(value));
                break;
            case DT_PLTRELSZ: t.relocations[0].count = value / sizeof(ElfW(Rela)); break;
            case DT_RELA:
                t.relocations[1].entries = reinterpret_cast<const ElfW(Rela) *>(at(value));
                break;
            case DT_RELASZ: t.relocations[1].count = value / sizeof(ElfW(Rela)); break;
            default: break;
            }
        }
        return 1;
    };
    dl_iterate_phdr(visit, &tables);
    return tables.symbols && tables.strings;
}

} // namespace

void RelocationSlots::Slot::write(void *value) const {
    const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    auto *begin = reinterpret_cast<void *>(page_of(reinterpret_cast<uint64_t>(place)));
    if (mprotect(begin, page, PROT_READ | PROT_WRITE) != 0) {
        throw Error(KVF_ERR_TAP, format("mprotect: %s", std::strerror(errno)));
    }
    __atomic_store_n(place, value, __ATOMIC_RELEASE);
    mprotect(begin, page, protection);
}

std::vector<RelocationSlots::Slot> RelocationSlots::find_all(const ObjectTables &tables,
                                                             std::span<Replacement> replacements) {
    std::vector<Slot> found;
    const auto note = [&](const ElfW(Rela) &entry, Replacement &replacement) {
        auto **place = reinterpret_cast<void **>(tables.base + entry.r_offset);
        const auto at = reinterpret_cast<uint64_t>(place);
        const bool relro = at >= tables.relro_begin && at < tables.relro_end;
        void *const content = __atomic_load_n(place, __ATOMIC_ACQUIRE);
        found.push_back({place, content, replacement.bound, replacement.ours,
                         relro ? PROT_READ : PROT_READ | PROT_WRITE});
        replacement.found = true;
        // A slot that has not been bound leads into the library itself, and from there to the
        // loader, which would put the function into the slot in our place.
        const auto there = reinterpret_cast<uint64_t>(content);
        if (there < tables.begin || there >= tables.end) replacement.previous = content;
    };
    for (const auto &table : tables.relocations) {
        for (size_t i = 0; i < table.count; ++i) {
            const auto &entry = table.entries[i];
            const uint32_t type = ELF64_R_TYPE(entry.r_info);
            if (type != kSlotTypes[0] && type != kSlotTypes[1]) continue;
            const char *name = tables.strings + tables.symbols[ELF64_R_SYM(entry.r_info)].st_name;
            for (auto &replacement : replacements) {
                if (std::strcmp(name, replacement.name) == 0) note(entry, replacement);
            }
        }
    }
    return found;
}

void RelocationSlots::find(uint64_t base, const std::string &path,
                           std::span<Replacement> replacements) {
    ObjectTables tables;
    if (!read_tables(base, tables)) {
        throw Error(KVF_ERR_TAP, "the libllama at " + path + " has no dynamic section");
    }
    for (auto &replacement : replacements) replacement.previous = replacement.bound;
    std::vector<Slot> found = find_all(tables, replacements);
    for (const auto &replacement : replacements) {
        if (replacement.found || !replacement.required) continue;
        throw Error(KVF_ERR_TAP,
                    "libllama (" + path + ") does not call " + replacement.name +
                        " through a relocation slot; is ggml linked into it statically?");
    }
    slots_ = std::move(found);
}

void RelocationSlots::write() {
    for (const Slot &slot : slots_) {
        if (slot.is_without_ours()) slot.write(slot.ours);
    }
}

void RelocationSlots::restore() noexcept {
    const auto is_nobody_elses = [](const Slot &slot) {
        return slot.is_ours() || slot.is_without_ours();
    };
    if (!std::all_of(slots_.begin(), slots_.end(), is_nobody_elses)) return;
    try {
        for (const Slot &slot : slots_) {
            if (slot.is_ours()) slot.write(slot.previous);
        }
        slots_.clear();
    } catch (...) {
        // A page cannot be written: as where somebody else's are there.
    }
}

} // namespace kvf
