#include "llama/tap.h"

#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <optional>
#include <stdexcept>

#include "core/fork.h"

namespace kvf {
namespace {

thread_local Recorder *recording = nullptr;

// libllama's own handlers catch std::exception and return an error.
struct LlamaAborted : std::runtime_error {
    using std::runtime_error::runtime_error;
};

#if defined(__x86_64__)
constexpr uint32_t kSlotTypes[] = {R_X86_64_JUMP_SLOT, R_X86_64_GLOB_DAT};
#elif defined(__aarch64__)
constexpr uint32_t kSlotTypes[] = {R_AARCH64_JUMP_SLOT, R_AARCH64_GLOB_DAT};
#else
#error "the tap knows x86-64 and 64-bit Arm"
#endif

struct Slot {
    void **place;
    void *previous;
    void *bound; // ggml's function: calls are bound lazily, so the loader may put it there after us
    void *ours;
    int protection; // of its page, once the loader is done with it

    void *content() const { return __atomic_load_n(place, __ATOMIC_ACQUIRE); }
    bool is_ours() const { return content() == ours; }
    // As if we had never been there: nobody calls ours. (Whoever else put something there after us calls us.)
    bool is_without_ours() const { return content() == previous || content() == bound; }
};

// The tables of one loaded object that say where its slots are.
struct ObjectTables {
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

uint64_t page_of(uint64_t address) {
    const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    return address / page * page;
}

bool read_tables(uint64_t base, ObjectTables &tables) {
    tables.base = base;
    const auto visit = [](dl_phdr_info *info, size_t, void *data) -> int {
        auto &t = *static_cast<ObjectTables *>(data);
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
                // In whole pages, as the loader protects them: what shares the last one with data is not.
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

void write_slot(const Slot &slot, void *value) {
    const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    auto *begin = reinterpret_cast<void *>(page_of(reinterpret_cast<uint64_t>(slot.place)));
    if (mprotect(begin, page, PROT_READ | PROT_WRITE) != 0) {
        throw Error(KVF_ERR_TAP, format("mprotect: %s", std::strerror(errno)));
    }
    __atomic_store_n(slot.place, value, __ATOMIC_RELEASE);
    mprotect(begin, page, slot.protection);
}

} // namespace

enum Hook {
    kTensorGet,
    kTensorSet,
    kBufferFree,
    kAbort,
    kOperatorNew,
    kOperatorDelete,
    kGraphCompute,
    kTensorCopy,
    kTensorMemset,
    kBufferClear,
    kHooks
};

// One libllama. Made at its first use and kept for ever: a thread may be inside a hook at any time.
// (find_llama() sees to it that the library itself stays loaded.)
struct Tap::Library {
    LlamaApi llama;
    // Where functions of ours are; also after the last user, while somebody else's are on top of them.
    std::vector<Slot> slots;
    // What was there before: ggml's functions, or somebody else's on the way to these.
    std::array<std::atomic<void *>, kHooks> previous{};
    template <class Function>
    Function before(Hook hook) const {
        return reinterpret_cast<Function>(previous[hook].load(std::memory_order_relaxed));
    }

    uint32_t users = 0;
    std::atomic<uint64_t> recorded{0}, passed_through{0};

    std::mutex observers_mutex; // held while an observer is told
    std::map<uint64_t, BufferFreed> observers;

    explicit Library(const LlamaApi &api) : llama(api) {}
    void install(size_t index);
    void take_back_slots();
    void uninstall() noexcept;
};

namespace {

constexpr size_t kMostLibraries = 8;

void forget_observers();

// Guards installing and uninstalling.
std::mutex &taps_mutex() {
    static std::mutex *mutex = [] {
        auto *m = new std::mutex;
        on_fork([m] { m->lock(); }, [m] { m->unlock(); },
                [m] {
                    forget_observers();
                    m->unlock();
                });
        return m;
    }();
    return *mutex;
}

uint64_t next_observer = 1;

// ---- What waits for transfers in flight --------------------------------------------------------

MemoryRange range_of(const ggml_tensor *tensor, uint64_t offset, uint64_t bytes,
                     const GgmlApi &ggml) {
    const uint64_t begin = reinterpret_cast<uint64_t>(ggml.get_data(tensor)) + offset;
    return {begin, begin + bytes};
}

MemoryRange range_of(const ggml_tensor *tensor, const GgmlApi &ggml) {
    return range_of(tensor, 0, ggml.nbytes(tensor), ggml);
}

// What a node of a graph does to memory that it does not own; nothing for views, which leave it as it is.
std::optional<Access> access_of(const ggml_tensor *node, const GgmlApi &ggml) {
    const char *const operation = ggml.op_desc(node);
    for (const char *view : {"VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE", "NONE"}) {
        if (std::strcmp(operation, view) == 0) return std::nullopt;
    }
    // What decoding does: the rows belong to the cells of its tokens, and so to no other sequence's.
    if (std::strcmp(operation, "SET_ROWS") == 0) return Access::WriteRows;
    return Access::Write; // shifts, moves of recurrent cells
}

// The rows of keys that decoding is about to write, in a cache of one kind of attention. Releases before v0.5.0 do not
// name this input of the graph. libllama itself writes it before it computes, so it lies in host memory.
RowNumbers rows_to_be_written(const ggml_cgraph *graph, const GgmlApi &ggml) {
    const ggml_tensor *const input = ggml.graph_get_tensor(graph, "attn_inp_k_idxs");
    if (!input) return {};
    return {static_cast<const int64_t *>(ggml.get_data(input)),
            ggml.nbytes(input) / sizeof(int64_t)};
}

void wait_before_computing(ggml_cgraph *graph, const GgmlApi &ggml) {
    if (!Fence::any()) return;
    const MemoryRange extent = Fence::extent();
    const int count = ggml.graph_n_nodes(graph);
    const RowNumbers rows = rows_to_be_written(graph, ggml);
    for (int i = 0; i < count; ++i) {
        const ggml_tensor *const node = ggml.graph_node(graph, i);
        if (reinterpret_cast<uint64_t>(ggml.get_data(node)) >= extent.end) continue;
        const MemoryRange range = range_of(node, ggml);
        if (range.end <= extent.begin) continue;
        if (const auto access = access_of(node, ggml)) Fence::wait(range, *access, rows);
    }
}

} // namespace

// What libllama calls instead. A function for each library, since a call does not say whose it is.
struct TapHooks {
    using OperatorNew = void *(*)(size_t);
    using OperatorDelete = void (*)(void *, size_t);

    static inline std::array<std::atomic<Tap::Library *>, kMostLibraries> libraries{};

    template <size_t index>
    static void tensor_get(const ggml_tensor *tensor, void *data, size_t offset, size_t bytes) {
        Tap::Library &library = *libraries[index].load(std::memory_order_acquire);
        const GgmlApi &ggml = library.llama.ggml;
        Recorder *const recorder = recording;
        if (recorder && recorder->record(tensor, data, offset, bytes, Direction::Save, ggml)) {
            library.recorded.fetch_add(1, std::memory_order_relaxed);
            return;
        }
        library.passed_through.fetch_add(1, std::memory_order_relaxed);
        if (Fence::any()) Fence::wait(range_of(tensor, offset, bytes, ggml), Access::Read);
        library.before<decltype(ggml.tensor_get)>(kTensorGet)(tensor, data, offset, bytes);
    }

    template <size_t index>
    static void tensor_set(ggml_tensor *tensor, const void *data, size_t offset, size_t bytes) {
        Tap::Library &library = *libraries[index].load(std::memory_order_acquire);
        const GgmlApi &ggml = library.llama.ggml;
        Recorder *const recorder = recording;
        if (recorder && recorder->record(tensor, data, offset, bytes, Direction::Load, ggml)) {
            library.recorded.fetch_add(1, std::memory_order_relaxed);
            return;
        }
        library.passed_through.fetch_add(1, std::memory_order_relaxed);
        if (Fence::any()) Fence::wait(range_of(tensor, offset, bytes, ggml), Access::Write);
        library.before<decltype(ggml.tensor_set)>(kTensorSet)(tensor, data, offset, bytes);
    }

    template <size_t index>
    static int graph_compute(ggml_backend_sched *sched, ggml_cgraph *graph) {
        Tap::Library &library = *libraries[index].load(std::memory_order_acquire);
        wait_before_computing(graph, library.llama.ggml);
        return library.before<decltype(GgmlApi::graph_compute)>(kGraphCompute)(sched, graph);
    }

    template <size_t index>
    static void tensor_copy(const ggml_tensor *source, ggml_tensor *target) {
        Tap::Library &library = *libraries[index].load(std::memory_order_acquire);
        const GgmlApi &ggml = library.llama.ggml;
        if (Fence::any()) {
            Fence::wait(range_of(source, ggml), Access::Read);
            Fence::wait(range_of(target, ggml), Access::Write);
        }
        library.before<decltype(GgmlApi::tensor_copy)>(kTensorCopy)(source, target);
    }

    template <size_t index>
    static void tensor_memset(ggml_tensor *tensor, uint8_t value, size_t offset, size_t bytes) {
        Tap::Library &library = *libraries[index].load(std::memory_order_acquire);
        const GgmlApi &ggml = library.llama.ggml;
        if (Fence::any()) Fence::wait(range_of(tensor, offset, bytes, ggml), Access::Write);
        library.before<decltype(GgmlApi::tensor_memset)>(kTensorMemset)(tensor, value, offset,
                                                                        bytes);
    }

    template <size_t index>
    static void buffer_clear(ggml_backend_buffer *buffer, uint8_t value) {
        Tap::Library &library = *libraries[index].load(std::memory_order_acquire);
        const GgmlApi &ggml = library.llama.ggml;
        if (Fence::any()) {
            const auto begin = reinterpret_cast<uint64_t>(ggml.buffer_get_base(buffer));
            Fence::wait({begin, begin + ggml.buffer_get_size(buffer)}, Access::Write);
        }
        library.before<decltype(GgmlApi::buffer_clear)>(kBufferClear)(buffer, value);
    }

    template <size_t index>
    static void buffer_free(ggml_backend_buffer *buffer) {
        Tap::Library &library = *libraries[index].load(std::memory_order_acquire);
        const GgmlApi &ggml = library.llama.ggml;
        if (buffer) {
            const auto begin = reinterpret_cast<uint64_t>(ggml.buffer_get_base(buffer));
            const uint64_t bytes = ggml.buffer_get_size(buffer);
            std::lock_guard lock(library.observers_mutex);
            for (auto &[id, tell] : library.observers) tell(begin, bytes);
        }
        library.before<decltype(ggml.buffer_free)>(kBufferFree)(buffer);
    }

    template <size_t index>
    static void abort(const char *file, int line, const char *format, ...) {
        char text[256];
        va_list arguments;
        va_start(arguments, format);
        std::vsnprintf(text, sizeof text, format, arguments);
        va_end(arguments);
        if (Recorder *const recorder = recording) {
            const char *name = std::strrchr(file, '/');
            recorder->note_abort(kvf::format("%s:%d: %s", name ? name + 1 : file, line, text));
            throw LlamaAborted(text);
        }
        const Tap::Library &library = *libraries[index].load(std::memory_order_acquire);
        library.before<decltype(GgmlApi::abort)>(kAbort)(file, line, "%s", text);
        __builtin_unreachable();
    }

    template <size_t index>
    static void *operator_new(size_t bytes) {
        Recorder *const recorder = recording;
        if (recorder && bytes >= BlockCache::kLeastBlock) {
            if (void *block = recorder->blocks().take(bytes)) return block;
        }
        const Tap::Library &library = *libraries[index].load(std::memory_order_acquire);
        return library.before<OperatorNew>(kOperatorNew)(bytes);
    }

    template <size_t index>
    static void operator_delete(void *memory, size_t bytes) {
        Recorder *const recorder = recording;
        if (recorder && memory && bytes >= BlockCache::kLeastBlock) {
            if (recorder->blocks().keep(memory, bytes)) return;
        }
        const Tap::Library &library = *libraries[index].load(std::memory_order_acquire);
        library.before<OperatorDelete>(kOperatorDelete)(memory, bytes);
    }

    using Functions = std::array<void *, kHooks>; // in the order of Hook
    template <size_t... indices>
    static constexpr auto make(std::index_sequence<indices...>) {
        return std::array<Functions, sizeof...(indices)>{
            Functions{reinterpret_cast<void *>(&tensor_get<indices>),
                      reinterpret_cast<void *>(&tensor_set<indices>),
                      reinterpret_cast<void *>(&buffer_free<indices>),
                      reinterpret_cast<void *>(&abort<indices>),
                      reinterpret_cast<void *>(&operator_new<indices>),
                      reinterpret_cast<void *>(&operator_delete<indices>),
                      reinterpret_cast<void *>(&graph_compute<indices>),
                      reinterpret_cast<void *>(&tensor_copy<indices>),
                      reinterpret_cast<void *>(&tensor_memset<indices>),
                      reinterpret_cast<void *>(&buffer_clear<indices>)}...};
    }
    static Functions functions(size_t index) {
        static const auto all = make(std::make_index_sequence<kMostLibraries>{});
        return all[index];
    }
};

namespace {

// In a forked child: the attachments are the parent's. What the child frees does not concern them, and
// their jobs would be waited for in vain. They are left as they are, since the fork may have met them
// half changed.
void forget_observers() {
    for (auto &place : TapHooks::libraries) {
        auto *library = place.load(std::memory_order_acquire);
        if (!library) continue;
        new (&library->observers_mutex) std::mutex;
        new (&library->observers) std::map<uint64_t, Tap::BufferFreed>;
    }
}

} // namespace

void Tap::Library::install(size_t index) {
    if (!slots.empty()) {
        // Somebody was on top of us when the last user went, and we are called still; or not any more.
        take_back_slots();
        return;
    }
    ObjectTables tables;
    if (!read_tables(llama.base, tables)) {
        throw Error(KVF_ERR_TAP, "the libllama at " + llama.path + " has no dynamic section");
    }
    const auto functions = TapHooks::functions(index);
    struct Wanted {
        const char *name;
        void *ours;
        bool required;
        void *bound;
        void *previous; // the same, unless somebody else's is found
        bool found = false;
    };
    const GgmlApi &ggml = llama.ggml;
    const auto address = [](auto function) { return reinterpret_cast<void *>(function); };
    std::array<Wanted, kHooks> wanted;
    const auto want = [&](Hook hook, const char *name, auto function, bool required) {
        wanted[hook] = {name, functions[hook], required, address(function), address(function)};
    };
    want(kTensorGet, "ggml_backend_tensor_get", ggml.tensor_get, true);
    want(kTensorSet, "ggml_backend_tensor_set", ggml.tensor_set, true);
    want(kBufferFree, "ggml_backend_buffer_free", ggml.buffer_free, true);
    want(kAbort, "ggml_abort", ggml.abort, true);
    want(kOperatorNew, "_Znwm", static_cast<TapHooks::OperatorNew>(::operator new), false);
    want(kOperatorDelete, "_ZdlPvm", static_cast<TapHooks::OperatorDelete>(::operator delete),
         false);
    want(kGraphCompute, "ggml_backend_sched_graph_compute_async", ggml.graph_compute, true);
    want(kTensorCopy, "ggml_backend_tensor_copy", ggml.tensor_copy, true);
    want(kTensorMemset, "ggml_backend_tensor_memset", ggml.tensor_memset, false);
    want(kBufferClear, "ggml_backend_buffer_clear", ggml.buffer_clear, true);

    std::vector<Slot> found;
    for (const auto &table : tables.relocations) {
        for (size_t i = 0; i < table.count; ++i) {
            const auto &entry = table.entries[i];
            const uint32_t type = ELF64_R_TYPE(entry.r_info);
            if (type != kSlotTypes[0] && type != kSlotTypes[1]) continue;
            const char *name = tables.strings + tables.symbols[ELF64_R_SYM(entry.r_info)].st_name;
            for (auto &w : wanted) {
                if (std::strcmp(name, w.name) != 0) continue;
                auto **place = reinterpret_cast<void **>(tables.base + entry.r_offset);
                const auto at = reinterpret_cast<uint64_t>(place);
                const bool relro = at >= tables.relro_begin && at < tables.relro_end;
                const Slot slot{place, __atomic_load_n(place, __ATOMIC_ACQUIRE), w.bound, w.ours,
                                relro ? PROT_READ : PROT_READ | PROT_WRITE};
                found.push_back(slot);
                w.found = true;
                // A slot that has not been bound leads into libllama itself, and from there to the loader,
                // which would put the function into the slot in our place.
                const auto there = reinterpret_cast<uint64_t>(slot.previous);
                if (there < tables.begin || there >= tables.end) w.previous = slot.previous;
            }
        }
    }
    for (const auto &w : wanted) {
        if (w.found || !w.required) continue;
        throw Error(KVF_ERR_TAP,
                    std::string("libllama (") + llama.path + ") does not call " + w.name +
                        " through a relocation slot; is ggml linked into it statically?");
    }
    for (size_t hook = 0; hook < kHooks; ++hook) previous[hook] = wanted[hook].previous;
    slots.reserve(found.size());
    try {
        for (const Slot &slot : found) {
            write_slot(slot, slot.ours);
            slots.push_back(slot);
        }
    } catch (...) {
        uninstall();
        throw;
    }
}

void Tap::Library::take_back_slots() {
    for (const Slot &slot : slots) {
        if (slot.is_without_ours()) write_slot(slot, slot.ours);
    }
}

// Whoever put something else there after us still calls us: then we stay, and pass calls on.
void Tap::Library::uninstall() noexcept {
    const auto is_nobody_elses = [](const Slot &slot) {
        return slot.is_ours() || slot.is_without_ours();
    };
    if (!std::all_of(slots.begin(), slots.end(), is_nobody_elses)) return;
    try {
        for (const Slot &slot : slots) {
            if (slot.is_ours()) write_slot(slot, slot.previous);
        }
        slots.clear();
    } catch (...) {
        // A page cannot be written: as above.
    }
}

Tap::Tap(const LlamaApi &llama, BufferFreed buffer_freed) {
    std::lock_guard lock(taps_mutex());
    Library *library = nullptr;
    size_t index = 0;
    for (; index < kMostLibraries; ++index) {
        library = TapHooks::libraries[index].load(std::memory_order_acquire);
        if (!library || (library->llama.base == llama.base && library->llama.path == llama.path))
            break;
    }
    if (index == kMostLibraries) throw Error(KVF_ERR_TAP, "more than 8 libllama have been loaded");
    if (!library) {
        library = new Library(llama);
        TapHooks::libraries[index].store(library, std::memory_order_release);
    }
    if (library->users == 0) {
        library->install(index);
    } else {
        library->take_back_slots();
    }
    ++library->users;
    library_ = library;
    observer_ = next_observer++;
    std::lock_guard observers_lock(library->observers_mutex);
    library->observers.emplace(observer_, std::move(buffer_freed));
}

Tap::~Tap() {
    {
        std::lock_guard lock(library_->observers_mutex);
        library_->observers.erase(observer_);
    }
    std::lock_guard lock(taps_mutex());
    if (--library_->users > 0) return;
    library_->uninstall();
}

void Tap::take_back_slots() {
    std::lock_guard lock(taps_mutex());
    library_->take_back_slots();
}

Tap::Counters Tap::counters() const {
    return {library_->recorded.load(std::memory_order_relaxed),
            library_->passed_through.load(std::memory_order_relaxed)};
}

namespace {

// In order, and those that touch as one.
std::vector<MemoryRange> joined(std::vector<MemoryRange> ranges) {
    std::sort(ranges.begin(), ranges.end(),
              [](const MemoryRange &a, const MemoryRange &b) { return a.begin < b.begin; });
    size_t kept = 0;
    for (const MemoryRange &range : ranges) {
        if (kept > 0 && range.begin <= ranges[kept - 1].end) {
            ranges[kept - 1].end = std::max(ranges[kept - 1].end, range.end);
        } else {
            ranges[kept++] = range;
        }
    }
    ranges.resize(kept);
    return ranges;
}

} // namespace

Recording::Recording(Recorder &recorder) { recording = &recorder; }
Recording::~Recording() { recording = nullptr; }

Recorder::Recorder(Direction direction, const void *buffer, uint64_t bytes, uint32_t devices,
                   Locate locate, BlockCache &blocks)
    : direction_(direction), buffer_(reinterpret_cast<uint64_t>(buffer)), buffer_bytes_(bytes),
      locate_(std::move(locate)), blocks_(blocks), builders_(devices), early_builders_(devices) {}

bool Recorder::record(const ggml_tensor *tensor, const void *data, uint64_t offset, uint64_t bytes,
                      Direction direction, const GgmlApi &ggml) noexcept {
    const uint64_t place = reinterpret_cast<uint64_t>(data) - buffer_;
    if (direction != direction_ || place >= buffer_bytes_ || bytes > buffer_bytes_ - place)
        return false;
    if (failure_) return true; // libllama's own copy might fail likewise, and end the process
    // This runs inside destructors of libllama's, out of which nothing may be thrown.
    try {
        if (tensor != tensor_) begin_tensor(tensor, offset, bytes, ggml);
        const uint64_t address = tensor_address_ + offset;
        reached_.begin = std::min(reached_.begin, address);
        reached_.end = std::max(reached_.end, address + bytes);
        if (!builder_) {
            // No device of the engine reaches this tensor: the original call, here and now.
            ++direct_fragments_;
            direct_bytes_ += bytes;
            return false;
        }
        if (is_plain_) {
            builder_->add(address, place, bytes);
        } else {
            add_with_care(address, place, bytes);
        }
    } catch (...) {
        if (!failure_) failure_ = std::current_exception();
    }
    return true;
}

// Where ranges are early, or other transfers keep loads off cells. What follows in the buffer is recorded later, so that
// early ranges are met in order.
void Recorder::add_with_care(uint64_t address, uint64_t place, uint64_t bytes) {
    if (tensors_.size() == 1) first_tensor_.push_back({address, address + bytes});
    // The cell may have been one of a transfer that follows a stream, and that transfer still needs it.
    if (direction_ == Direction::Load && Fence::any_close())
        Fence::wait({address, address + bytes}, Access::WriteRows);
    while (next_early_ < early_.size() && early_[next_early_].end <= place) ++next_early_;
    for (size_t i = next_early_; i < early_.size() && early_[i].begin < place + bytes; ++i) {
        const uint64_t before = std::max(early_[i].begin, place) - place;
        if (before) builder_->add(address, place, before);
        const uint64_t early = std::min(early_[i].end - place, bytes) - before;
        early_builder_->add(address + before, place + before, early);
        address += before + early;
        place += before + early;
        bytes -= before + early;
    }
    if (bytes) builder_->add(address, place, bytes);
}

void Recorder::begin_tensor(const ggml_tensor *tensor, uint64_t offset, uint64_t bytes,
                            const GgmlApi &ggml) {
    if (!listed_ns_) listed_ns_ = now_ns();
    LayoutBuilder *const former = builder_;
    if (tensors_.size() == 1) end_first_tensor();
    tensor_ = tensor;
    tensor_address_ = reinterpret_cast<uint64_t>(ggml.get_data(tensor));
    tensors_.push_back(tensor_address_);
    if (reached_.begin < reached_.end) memory_.push_back(reached_);
    reached_ = {UINT64_MAX, 0};
    // Fences around this context's memory are raised by the thread that records.
    is_plain_ = tensors_.size() > 1 && early_.empty() &&
                !(direction_ == Direction::Load && Fence::any_close());
    const int64_t device = locate_(tensor_address_ + offset, bytes);
    if (former) former->begin_tensor();
    if (early_builder_) early_builder_->begin_tensor();
    builder_ = device < 0 ? nullptr : &builders_[static_cast<size_t>(device)];
    early_builder_ = device < 0 ? nullptr : &early_builders_[static_cast<size_t>(device)];
    if (former && sink_ && !failure_ && former->bytes() >= least_part_) {
        Layout part = former->take();
        sunk_segments_ += part.segments();
        sunk_bytes_ += part.bytes;
        sink_(static_cast<uint32_t>(former - builders_.data()), std::move(part));
    }
}

// Before any of its bytes may move: where the sequence of another transfer has lost cells meanwhile, a load may have been
// given these.
void Recorder::end_first_tensor() {
    first_tensor_ = joined(std::move(first_tensor_));
    if (direction_ == Direction::Load && Fence::any()) Fence::wait_for_rows(first_tensor_);
}

Recorded Recorder::finish() {
    if (failure_) {
        try {
            std::rethrow_exception(failure_);
        } catch (const std::bad_alloc &) {
            throw Error(KVF_ERR_OUT_OF_MEMORY, "while recording the layout");
        }
    }
    if (tensors_.size() == 1) end_first_tensor();
    Recorded result;
    result.listed_ns = listed_ns_;
    result.recorded_ns = now_ns();
    result.fragments = direct_fragments_;
    result.segments = direct_fragments_ + sunk_segments_;
    result.bytes = direct_bytes_ + sunk_bytes_;
    for (uint32_t device = 0; device < builders_.size(); ++device) {
        result.fragments += builders_[device].fragments();
        Layout layout = builders_[device].finish();
        if (layout.empty()) continue;
        result.segments += layout.segments();
        result.bytes += layout.bytes;
        result.layouts.emplace_back(device, std::move(layout));
    }
    for (uint32_t device = 0; device < early_builders_.size(); ++device) {
        result.fragments += early_builders_[device].fragments();
        Layout layout = early_builders_[device].finish();
        if (layout.empty()) continue;
        result.segments += layout.segments();
        result.bytes += layout.bytes;
        early_layouts_.emplace_back(device, std::move(layout));
    }
    return result;
}

std::vector<MemoryRange> Recorder::first_tensor() const { return first_tensor_; }

std::vector<MemoryRange> Recorder::memory() const {
    std::vector<MemoryRange> ranges(memory_);
    if (reached_.begin < reached_.end) ranges.push_back(reached_);
    return joined(std::move(ranges));
}

} // namespace kvf
