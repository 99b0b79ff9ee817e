#include "llama/tap.h"

#include <array>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <stdexcept>

#include "core/fork.h"
#include "llama/recorder.h"
#include "llama/relocation.h"
#include "llama/waiting.h"

namespace kvf {
namespace {

// libllama's own handlers catch std::exception and return an error.
struct LlamaAborted : std::runtime_error {
    using std::runtime_error::runtime_error;
};

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

} // namespace

// One libllama. Made at its first use and kept for ever: a thread may be inside a hook at any time.
// (find_llama() sees to it that the library itself stays loaded.)
struct Tap::Library {
    LlamaApi llama;
    // Where our functions are; also after the last user, while somebody else's are on top of them.
    RelocationSlots slots;
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
    using OperatorNew = void *(*)(size_t);
    using OperatorDelete = void (*)(void *, size_t);

    static inline std::array<std::atomic<Tap::Library *>, kMostLibraries> libraries{};

    // A copy out of a tensor (Save) or into it (Load): recorded, or made once no transfer is in its
    // way.
    template <class Tensor, class Data>
    static void move_tensor(size_t index, Direction direction, Tensor *tensor, Data *data,
                            size_t offset, size_t bytes) {
        Tap::Library &library = *libraries[index].load(std::memory_order_acquire);
        const GgmlApi &ggml = library.llama.ggml;
        Recorder *const recorder = Recording::current();
        if (recorder && recorder->record(tensor, data, offset, bytes, direction, ggml)) return;
        library.passed_through.fetch_add(1, std::memory_order_relaxed);
        const bool reads = direction == Direction::Save;
        wait_for_transfers(tensor, offset, bytes, reads ? Access::Read : Access::Write, ggml);
        using Function = void (*)(Tensor *, Data *, size_t, size_t);
        library.before<Function>(reads ? kTensorGet : kTensorSet)(tensor, data, offset, bytes);
    }

    template <size_t index>
    static void tensor_get(const ggml_tensor *tensor, void *data, size_t offset, size_t bytes) {
        move_tensor(index, Direction::Save, tensor, data, offset, bytes);
    }

    template <size_t index>
    static void tensor_set(ggml_tensor *tensor, const void *data, size_t offset, size_t bytes) {
        move_tensor(index, Direction::Load, tensor, data, offset, bytes);
    }

    template <size_t index>
    static int graph_compute(ggml_backend_sched *sched, ggml_cgraph *graph) {
        Tap::Library &library = *libraries[index].load(std::memory_order_acquire);
        wait_for_transfers(graph, library.llama.ggml);
        return library.before<decltype(GgmlApi::graph_compute)>(kGraphCompute)(sched, graph);
    }

    template <size_t index>
    static void tensor_copy(const ggml_tensor *source, ggml_tensor *target) {
        Tap::Library &library = *libraries[index].load(std::memory_order_acquire);
        const GgmlApi &ggml = library.llama.ggml;
        wait_for_transfers(source, Access::Read, ggml);
        wait_for_transfers(target, Access::Write, ggml);
        library.before<decltype(GgmlApi::tensor_copy)>(kTensorCopy)(source, target);
    }

    template <size_t index>
    static void tensor_memset(ggml_tensor *tensor, uint8_t value, size_t offset, size_t bytes) {
        Tap::Library &library = *libraries[index].load(std::memory_order_acquire);
        const GgmlApi &ggml = library.llama.ggml;
        wait_for_transfers(tensor, offset, bytes, Access::Write, ggml);
        library.before<decltype(GgmlApi::tensor_memset)>(kTensorMemset)(tensor, value, offset,
                                                                        bytes);
    }

    template <size_t index>
    static void buffer_clear(ggml_backend_buffer *buffer, uint8_t value) {
        Tap::Library &library = *libraries[index].load(std::memory_order_acquire);
        const GgmlApi &ggml = library.llama.ggml;
        wait_for_transfers(buffer, ggml);
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
        if (Recorder *const recorder = Recording::current()) {
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
        Recorder *const recorder = Recording::current();
        if (recorder && bytes >= HeapCache::kLeastBytes) {
            if (void *memory = recorder->heap().take(bytes)) return memory;
        }
        const Tap::Library &library = *libraries[index].load(std::memory_order_acquire);
        return library.before<OperatorNew>(kOperatorNew)(bytes);
    }

    template <size_t index>
    static void operator_delete(void *memory, size_t bytes) {
        Recorder *const recorder = Recording::current();
        if (recorder && memory && bytes >= HeapCache::kLeastBytes &&
            recorder->heap().keep(memory, bytes))
            return;
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

// In a forked child: the attachments are the parent's. What the child frees does not concern them,
// and their jobs would be waited for in vain. They are left as they are, since the fork may have
// met them half changed.
void forget_observers() {
    for (auto &place : TapHooks::libraries) {
        auto *library = place.load(std::memory_order_acquire);
        if (!library) continue;
        new (&library->observers_mutex) std::mutex;
        new (&library->observers) std::map<uint64_t, Tap::BufferFreed>;
    }
}

// What takes the place of which function, in the order of Hook.
std::array<Replacement, kHooks> replacements_for(const GgmlApi &ggml,
                                                 const TapHooks::Functions &functions) {
    std::array<Replacement, kHooks> all;
    const auto want = [&](Hook hook, const char *name, auto function, bool required) {
        void *const address = reinterpret_cast<void *>(function);
        all[hook] = {name, functions[hook], required, address, address};
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
    return all;
}

} // namespace

// Somebody who replaced our function earlier may still call it, or may not.
void Tap::Library::install(size_t index) {
    if (slots.empty()) {
        auto replacements = replacements_for(llama.ggml, TapHooks::functions(index));
        slots.find(llama.base, llama.path, replacements);
        for (size_t hook = 0; hook < kHooks; ++hook) previous[hook] = replacements[hook].previous;
    }
    try {
        slots.write();
    } catch (...) {
        slots.restore();
        throw;
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
        library->slots.write();
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
    library_->slots.restore();
}

void Tap::renew_slots() {
    std::lock_guard lock(taps_mutex());
    library_->slots.write();
}

std::atomic<uint64_t> &Tap::recorded_calls() { return library_->recorded; }

Tap::Counters Tap::counters() const {
    return {library_->recorded.load(std::memory_order_relaxed),
            library_->passed_through.load(std::memory_order_relaxed)};
}

} // namespace kvf
