#include "tap.h"

#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <stdexcept>

#include "fork.h"

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
    void *ours;
    int protection; // of its page, once the loader is done with it
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
    uint64_t relro_begin = 0, relro_end = 0;
};

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
            } else if (segment.p_type == PT_GNU_RELRO) {
                t.relro_begin = t.base + segment.p_vaddr;
                t.relro_end = t.relro_begin + segment.p_memsz;
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
    auto *begin = reinterpret_cast<void *>(reinterpret_cast<uint64_t>(slot.place) / page * page);
    if (mprotect(begin, page, PROT_READ | PROT_WRITE) != 0) {
        throw Error(KVF_ERR_TAP, format("mprotect: %s", std::strerror(errno)));
    }
    __atomic_store_n(slot.place, value, __ATOMIC_RELEASE);
    mprotect(begin, page, slot.protection);
}

} // namespace

// One libllama. Made at its first use and kept for ever: a thread may be inside a hook at any time.
// (find_llama() sees to it that the library itself stays loaded.)
struct Tap::Library {
    LlamaApi llama;
    std::vector<Slot> slots;
    uint32_t users = 0;
    std::atomic<uint64_t> recorded{0}, passed_through{0};

    std::mutex observers_mutex; // held while an observer is told
    std::map<uint64_t, BufferFreed> observers;

    void install(size_t index);
    void uninstall();
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

} // namespace

// What libllama calls instead. A function for each library, since a call does not say whose it is.
struct TapHooks {
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
        ggml.tensor_get(tensor, data, offset, bytes);
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
        ggml.tensor_set(tensor, data, offset, bytes);
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
        ggml.buffer_free(buffer);
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
        libraries[index].load(std::memory_order_acquire)->llama.ggml.abort(file, line, "%s", text);
        __builtin_unreachable();
    }

    template <size_t index>
    static void *operator_new(size_t bytes) {
        Recorder *const recorder = recording;
        if (recorder && bytes >= BlockCache::kLeastBlock) {
            if (void *block = recorder->blocks().take(bytes)) return block;
        }
        return ::operator new(bytes);
    }

    template <size_t index>
    static void operator_delete(void *memory, size_t bytes) {
        Recorder *const recorder = recording;
        if (recorder && memory && bytes >= BlockCache::kLeastBlock) {
            if (recorder->blocks().keep(memory, bytes)) return;
        }
        ::operator delete(memory, bytes);
    }

    struct Functions {
        void *tensor_get, *tensor_set, *buffer_free, *abort, *operator_new, *operator_delete;
    };
    template <size_t... indices>
    static constexpr auto make(std::index_sequence<indices...>) {
        return std::array<Functions, sizeof...(indices)>{
            Functions{reinterpret_cast<void *>(&tensor_get<indices>),
                      reinterpret_cast<void *>(&tensor_set<indices>),
                      reinterpret_cast<void *>(&buffer_free<indices>),
                      reinterpret_cast<void *>(&abort<indices>),
                      reinterpret_cast<void *>(&operator_new<indices>),
                      reinterpret_cast<void *>(&operator_delete<indices>)}...};
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
    ObjectTables tables;
    if (!read_tables(llama.base, tables)) {
        throw Error(KVF_ERR_TAP, "the libllama at " + llama.path + " has no dynamic section");
    }
    const auto functions = TapHooks::functions(index);
    struct Wanted {
        const char *name;
        void *ours;
        bool required;
        bool found = false;
    } wanted[] = {{"ggml_backend_tensor_get", functions.tensor_get, true},
                  {"ggml_backend_tensor_set", functions.tensor_set, true},
                  {"ggml_backend_buffer_free", functions.buffer_free, true},
                  {"ggml_abort", functions.abort, true},
                  {"_Znwm", functions.operator_new, false},
                  {"_ZdlPvm", functions.operator_delete, false}};

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
                found.push_back({place, __atomic_load_n(place, __ATOMIC_ACQUIRE), w.ours,
                                 relro ? PROT_READ : PROT_READ | PROT_WRITE});
                w.found = true;
            }
        }
    }
    for (const auto &w : wanted) {
        if (w.found || !w.required) continue;
        throw Error(KVF_ERR_TAP,
                    std::string("libllama (") + llama.path + ") does not call " + w.name +
                        " through a relocation slot; is ggml linked into it statically?");
    }
    for (size_t i = 0; i < found.size(); ++i) {
        try {
            write_slot(found[i], found[i].ours);
        } catch (...) {
            while (i > 0) {
                --i;
                write_slot(found[i], found[i].previous);
            }
            throw;
        }
    }
    slots = std::move(found);
}

void Tap::Library::uninstall() {
    for (const Slot &slot : slots) {
        // Whoever put something else there after us still calls us; then we stay, and pass calls on.
        if (__atomic_load_n(slot.place, __ATOMIC_ACQUIRE) == slot.ours) {
            write_slot(slot, slot.previous);
        }
    }
    slots.clear();
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
        library = new Library;
        library->llama = llama;
        TapHooks::libraries[index].store(library, std::memory_order_release);
    }
    if (library->users == 0) {
        library->install(index);
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

Tap::Counters Tap::counters() const {
    return {library_->recorded.load(std::memory_order_relaxed),
            library_->passed_through.load(std::memory_order_relaxed)};
}

Recording::Recording(Recorder &recorder) { recording = &recorder; }
Recording::~Recording() { recording = nullptr; }

Recorder::Recorder(Direction direction, const void *buffer, uint64_t bytes, uint32_t devices,
                   Locate locate, BlockCache &blocks)
    : direction_(direction), buffer_(reinterpret_cast<uint64_t>(buffer)), buffer_bytes_(bytes),
      locate_(std::move(locate)), blocks_(blocks), builders_(devices) {}

bool Recorder::record(const ggml_tensor *tensor, const void *data, uint64_t offset, uint64_t bytes,
                      Direction direction, const GgmlApi &ggml) noexcept {
    const uint64_t place = reinterpret_cast<uint64_t>(data) - buffer_;
    if (direction != direction_ || place >= buffer_bytes_ || bytes > buffer_bytes_ - place)
        return false;
    if (failure_) return true; // libllama's own copy might fail likewise, and end the process
    // This runs inside destructors of libllama's, out of which nothing may be thrown.
    try {
        if (tensor != tensor_) begin_tensor(tensor, offset, bytes, ggml);
        if (!builder_) {
            // No device of the engine reaches this tensor: the original call, here and now.
            ++direct_fragments_;
            direct_bytes_ += bytes;
            return false;
        }
        builder_->add(tensor_address_ + offset, place, bytes);
    } catch (...) {
        if (!failure_) failure_ = std::current_exception();
    }
    return true;
}

void Recorder::begin_tensor(const ggml_tensor *tensor, uint64_t offset, uint64_t bytes,
                            const GgmlApi &ggml) {
    if (!listed_ns_) listed_ns_ = now_ns();
    LayoutBuilder *const former = builder_;
    tensor_ = tensor;
    tensor_address_ = reinterpret_cast<uint64_t>(ggml.get_data(tensor));
    tensors_.push_back(tensor_address_);
    const int64_t device = locate_(tensor_address_ + offset, bytes);
    builder_ = device < 0 ? nullptr : &builders_[static_cast<size_t>(device)];
    if (former) former->begin_tensor();
    if (former && sink_ && !failure_ && former->bytes() >= least_part_) {
        Layout part = former->take();
        sunk_segments_ += part.segments();
        sunk_bytes_ += part.bytes;
        sink_(static_cast<uint32_t>(former - builders_.data()), std::move(part));
    }
}

Recorded Recorder::finish() {
    if (failure_) {
        try {
            std::rethrow_exception(failure_);
        } catch (const std::bad_alloc &) {
            throw Error(KVF_ERR_OUT_OF_MEMORY, "while recording the layout");
        }
    }
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
    return result;
}

} // namespace kvf
