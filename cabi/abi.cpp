// The C ABI: checks arguments, finds objects by their handles, and turns exceptions into statuses.

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#include "engine/regions.h"
#include "llama/llama.h"
#include "memory/registration.h"
#include "states/blocks.h"

namespace kvf {
namespace {

// Runs `function`, and says in the caller's buffer why it failed.
template <class Function>
int32_t guarded(char *error, uint64_t error_size, Function &&function) noexcept {
    try {
        return function();
    } catch (const Error &e) {
        copy_text(describe(e), error, error_size);
        return e.status;
    } catch (const std::bad_alloc &) {
        copy_text(kvf_strerror(KVF_ERR_OUT_OF_MEMORY), error, error_size);
        return KVF_ERR_OUT_OF_MEMORY;
    } catch (const std::exception &e) {
        // Threads that could not be started, mostly.
        copy_text(e.what(), error, error_size);
        return KVF_ERR_SYSTEM;
    } catch (...) {
        return KVF_ERR_INTERNAL;
    }
}

template <class Function>
int32_t guarded(Function &&function) noexcept {
    return guarded(nullptr, 0, std::forward<Function>(function));
}

// No version's structs come near this size: a larger one is a mistake.
constexpr uint64_t kLargestStruct = 4096;

// Checks the caller's sizeof a struct that the library fills in.
void check_struct_size(uint64_t size) {
    if (size < sizeof(uint64_t) || size > kLargestStruct) {
        throw Error(KVF_ERR_STRUCT_SIZE,
                    format("size is %llu", static_cast<unsigned long long>(size)));
    }
}

// A copy of the caller's options as this version knows them. NULL gives the defaults.
template <class Options>
Options read_options(const Options *given) {
    Options options{};
    options.size = sizeof options;
    if (!given) return options;
    uint32_t size;
    std::memcpy(&size, given, sizeof size);
    if (size < 2 * sizeof(uint32_t) || size > kLargestStruct) {
        throw Error(KVF_ERR_STRUCT_SIZE, format("size is %u; sizeof is %zu", size, sizeof options));
    }
    std::memcpy(&options, given, std::min<size_t>(size, sizeof options));
    const auto *bytes = reinterpret_cast<const unsigned char *>(given);
    for (size_t i = sizeof options; i < size; ++i) {
        if (bytes[i])
            throw Error(KVF_ERR_STRUCT_SIZE, "fields that this version does not know are set");
    }
    return options;
}

// Where a failing call may write its text. Nowhere if the options are too short to say so, or
// malformed.
template <class Options>
std::pair<char *, uint64_t> error_place(const Options *given) {
    constexpr size_t end = offsetof(Options, error_size) + sizeof given->error_size;
    if (!given || given->size < end || given->size > kLargestStruct) return {nullptr, 0};
    return {given->error, given->error_size};
}

template <class T>
void require(const T *pointer, const char *name) {
    if (!pointer) throw Error(KVF_ERR_INVALID_ARGUMENT, std::string(name) + " is NULL");
}

// The caller's array of blocks, as this version knows them. What is written into `bytes` is the
// caller's after write_sizes(), at the latest when this ends.
class BlocksOfCaller {
public:
    BlocksOfCaller(kvf_block *given, uint64_t size, uint32_t count)
        : given_(reinterpret_cast<unsigned char *>(given)), size_(size) {
        if (count) require(given, "blocks");
        if (size < sizeof(kvf_block) || size > kLargestStruct || size % alignof(kvf_block)) {
            throw Error(KVF_ERR_STRUCT_SIZE,
                        format("block_size is %llu", static_cast<unsigned long long>(size)));
        }
        blocks.resize(count);
        for (uint32_t i = 0; i < count; ++i)
            std::memcpy(&blocks[i], given_ + i * size_, sizeof(kvf_block));
        before_ = blocks;
    }
    // For what a call writes although it fails.
    ~BlocksOfCaller() { write_sizes(); }

    void write_sizes() {
        for (size_t i = 0; i < blocks.size(); ++i) {
            if (blocks[i].bytes == before_[i].bytes) continue;
            std::memcpy(given_ + i * size_, &blocks[i], sizeof(kvf_block));
        }
        before_ = blocks;
    }
    BlocksOfCaller(const BlocksOfCaller &) = delete;
    BlocksOfCaller &operator=(const BlocksOfCaller &) = delete;

    std::vector<kvf_block> blocks;

private:
    unsigned char *const given_;
    const uint64_t size_;
    std::vector<kvf_block> before_;
};

void check_submit(const kvf_submit_options &options, uint32_t flags) {
    if (options.priority > KVF_PRIORITY_URGENT) {
        throw Error(KVF_ERR_INVALID_ARGUMENT, "no such priority");
    }
    if (options.flags & ~flags) throw Error(KVF_ERR_INVALID_ARGUMENT, "unknown flags");
}

// A job's handle does not tell of its blocks.
void check_somebody_is_told(const kvf_submit_options &options) {
    if (options.flags & KVF_SUBMIT_EACH_BLOCK && !options.queue && !options.callback) {
        throw Error(KVF_ERR_INVALID_ARGUMENT,
                    "there is no queue and no callback to tell of each block");
    }
}

// Loads have modes of other numbers, so that a mode meant for one of them is never taken for one of
// the other.
void check_save_mode(uint32_t mode) {
    switch (mode) {
    case KVF_SAVE_AUTO:
    case KVF_SAVE_IN_PLACE:
    case KVF_SAVE_SNAPSHOT: return;
    default: throw Error(KVF_ERR_INVALID_ARGUMENT, format("%u is no mode of a save", mode));
    }
}

void check_load_mode(uint32_t mode) {
    switch (mode) {
    case KVF_LOAD_AUTO:
    case KVF_LOAD_IN_PLACE:
    case KVF_LOAD_AHEAD: return;
    default: throw Error(KVF_ERR_INVALID_ARGUMENT, format("%u is no mode of a load", mode));
    }
}

// Writes a text into the caller's buffer, cut to fit, and the bytes that the whole needs. Callers
// ask twice: for the size, then for the text.
int32_t write_text(const std::string &text, char *buffer, uint64_t capacity, uint64_t *needed) {
    if (needed) *needed = text.size() + 1;
    if (capacity) require(buffer, "json");
    copy_text(text, buffer, capacity);
    return capacity > text.size() ? KVF_OK : KVF_ERR_BUFFER_TOO_SMALL;
}

int32_t move_regions(Direction direction, kvf_engine engine, const kvf_region *regions,
                     uint64_t count, void *buffer, uint64_t bytes, const kvf_submit_options *given,
                     kvf_job *job) {
    const auto [error, error_size] = error_place(given);
    return guarded(error, error_size, [&]() -> int32_t {
        const auto options = read_options(given);
        check_submit(options, KVF_SUBMIT_FOLLOW_STREAM);
        if (options.mode) throw Error(KVF_ERR_INVALID_ARGUMENT, "regions have no mode");
        submit_regions(*find<Engine>(engine), direction, regions, count, buffer, bytes, options,
                       job);
        return KVF_OK;
    });
}

} // namespace
} // namespace kvf

using namespace kvf;

extern "C" {

#define KVF_STRING_(x) #x
#define KVF_STRING(x) KVF_STRING_(x)

const char *kvf_version(void) {
    return KVF_STRING(KVF_VERSION_MAJOR) "." KVF_STRING(KVF_VERSION_MINOR) "." KVF_STRING(
        KVF_VERSION_PATCH);
}

uint32_t kvf_abi_version(void) { return KVF_ABI_VERSION; }

// ---- engine ------------------------------------------------------------------------------------

int32_t kvf_engine_create(const kvf_engine_options *given, kvf_engine *engine) {
    const auto [error, error_size] = error_place(given);
    return guarded(error, error_size, [&]() -> int32_t {
        require(engine, "engine");
        const auto options = read_options(given);
        if (options.devices > KVF_DEVICES_CUDA)
            throw Error(KVF_ERR_INVALID_ARGUMENT, "no such devices");
        if (options.flags & ~uint32_t{KVF_ENGINE_TRACE}) {
            throw Error(KVF_ERR_INVALID_ARGUMENT, "unknown flags");
        }
        if (options.cuda_devices && options.devices == KVF_DEVICES_HOST) {
            throw Error(KVF_ERR_INVALID_ARGUMENT,
                        "CUDA devices are named, and the engine is for the host alone");
        }
        if (options.copy_threads > 256)
            throw Error(KVF_ERR_INVALID_ARGUMENT, "copy_threads is above 256");
        auto made = std::make_shared<Engine>(options);
        const kvf_engine handle = new_handle(ObjectType::Engine);
        publish(handle, std::move(made));
        *engine = handle;
        return KVF_OK;
    });
}

int32_t kvf_engine_describe(kvf_engine engine, char *json, uint64_t capacity, uint64_t *needed) {
    return guarded(
        [&] { return write_text(find<Engine>(engine)->describe(), json, capacity, needed); });
}

int32_t kvf_engine_cancel(kvf_engine engine) {
    return guarded([&]() -> int32_t {
        find<Engine>(engine)->cancel([](const Job &) { return true; });
        return KVF_OK;
    });
}

int32_t kvf_engine_destroy(kvf_engine engine) {
    return guarded([&]() -> int32_t {
        find<Engine>(engine)->close();
        withdraw<Engine>(engine);
        return KVF_OK;
    });
}

int32_t kvf_engine_trace(kvf_engine engine, kvf_trace_event *events, uint64_t event_size,
                         uint32_t capacity) {
    return guarded([&]() -> int32_t {
        if (capacity) require(events, "events");
        check_struct_size(event_size);
        return static_cast<int32_t>(find<Engine>(engine)->take_trace(events, event_size, capacity));
    });
}

// ---- memory ------------------------------------------------------------------------------------

int32_t kvf_buffer_alloc(kvf_engine engine, uint64_t bytes, void **buffer) {
    return kvf_buffer_alloc_with_error(engine, bytes, buffer, nullptr, 0);
}

int32_t kvf_buffer_alloc_with_error(kvf_engine engine, uint64_t bytes, void **buffer, char *error,
                                    uint64_t error_size) {
    return guarded(error, error_size, [&]() -> int32_t {
        require(buffer, "buffer");
        *buffer = find<Engine>(engine)->pool().alloc(bytes);
        return KVF_OK;
    });
}

int32_t kvf_buffer_free(void *buffer) {
    return guarded([&]() -> int32_t {
        free_buffer(buffer);
        return KVF_OK;
    });
}

int32_t kvf_buffer_capacity(const void *buffer, uint64_t *bytes) {
    return guarded([&]() -> int32_t {
        require(bytes, "bytes");
        *bytes = buffer_capacity(buffer);
        return KVF_OK;
    });
}

int32_t kvf_buffer_register(kvf_engine engine, void *buffer, uint64_t bytes) {
    return guarded([&]() -> int32_t {
        register_memory(buffer, bytes, find<Engine>(engine)->pinner());
        return KVF_OK;
    });
}

int32_t kvf_buffer_unregister(kvf_engine engine, void *buffer) {
    return guarded([&]() -> int32_t {
        try {
            find<Engine>(engine);
        } catch (const Error &error) {
            // The range outlives its engine. (A parent's does not: the child has none of it.)
            if (error.status == KVF_ERR_FORKED || !is_registered(buffer)) throw;
        }
        unregister_memory(buffer);
        return KVF_OK;
    });
}

int32_t kvf_buffer_trim(kvf_engine engine) {
    return guarded([&]() -> int32_t {
        find<Engine>(engine)->trim();
        return KVF_OK;
    });
}

// ---- completions -------------------------------------------------------------------------------

int32_t kvf_queue_create(kvf_queue *queue) {
    return guarded([&]() -> int32_t {
        require(queue, "queue");
        auto made = std::make_shared<Queue>();
        const kvf_queue handle = new_handle(ObjectType::Queue);
        publish(handle, std::move(made));
        *queue = handle;
        return KVF_OK;
    });
}

int32_t kvf_queue_fd(kvf_queue queue) {
    return guarded([&]() -> int32_t { return find<Queue>(queue)->fd(); });
}

int32_t kvf_queue_take(kvf_queue queue, kvf_completion *completions, uint64_t completion_size,
                       uint32_t capacity, int64_t timeout_ns) {
    return guarded([&]() -> int32_t {
        require(completions, "completions");
        if (capacity == 0) throw Error(KVF_ERR_INVALID_ARGUMENT, "capacity is 0");
        check_struct_size(completion_size);
        const uint32_t most = std::min<uint32_t>(capacity, INT32_MAX);
        return static_cast<int32_t>(
            find<Queue>(queue)->take(completions, completion_size, most, timeout_ns));
    });
}

int32_t kvf_queue_wake(kvf_queue queue) {
    return guarded([&]() -> int32_t {
        find<Queue>(queue)->wake();
        return KVF_OK;
    });
}

int32_t kvf_queue_destroy(kvf_queue queue) {
    return guarded([&]() -> int32_t {
        if (!find<Queue>(queue)->close()) {
            throw Error(KVF_ERR_BUSY, "jobs in flight would complete into it");
        }
        withdraw<Queue>(queue);
        return KVF_OK;
    });
}

// ---- jobs --------------------------------------------------------------------------------------

int32_t kvf_job_poll(kvf_job job, kvf_completion *completion, uint64_t completion_size) {
    return guarded([&]() -> int32_t {
        if (completion) check_struct_size(completion_size);
        kvf_completion ended;
        if (!find<Job>(job)->ended(&ended)) return 0;
        if (completion) copy_struct(ended, completion, completion_size);
        return 1;
    });
}

int32_t kvf_job_wait(kvf_job job, int64_t timeout_ns, kvf_completion *completion,
                     uint64_t completion_size) {
    return guarded([&]() -> int32_t {
        if (completion) check_struct_size(completion_size);
        kvf_completion ended;
        if (!find<Job>(job)->wait(timeout_ns, &ended)) return KVF_ERR_TIMEOUT;
        if (completion) copy_struct(ended, completion, completion_size);
        return KVF_OK;
    });
}

int32_t kvf_job_cancel(kvf_job job) {
    return guarded([&]() -> int32_t {
        const auto found = find<Job>(job);
        // A job whose engine is gone has ended. Else the engine, and with it the devices, must
        // stay.
        if (const auto engine = found->owner()) found->cancel();
        return KVF_OK;
    });
}

int32_t kvf_job_stream_wait(kvf_job job, uint64_t stream) {
    return guarded([&]() -> int32_t {
        const auto found = find<Job>(job);
        // A job whose engine is gone has ended: there is nothing to wait for.
        if (const auto engine = found->owner()) engine->make_stream_wait(stream, *found);
        return KVF_OK;
    });
}

int32_t kvf_job_release(kvf_job job) {
    return guarded([&]() -> int32_t {
        withdraw<Job>(job);
        return KVF_OK;
    });
}

// ---- regions -----------------------------------------------------------------------------------

int32_t kvf_regions_size(const kvf_region *regions, uint64_t count, uint64_t *bytes) {
    return guarded([&]() -> int32_t {
        require(bytes, "bytes");
        *bytes = regions_size(regions, count);
        return KVF_OK;
    });
}

int32_t kvf_regions_save(kvf_engine engine, const kvf_region *regions, uint64_t count, void *buffer,
                         uint64_t bytes, const kvf_submit_options *options, kvf_job *job) {
    return move_regions(Direction::Save, engine, regions, count, buffer, bytes, options, job);
}

int32_t kvf_regions_load(kvf_engine engine, const kvf_region *regions, uint64_t count,
                         const void *buffer, uint64_t bytes, const kvf_submit_options *options,
                         kvf_job *job) {
    return move_regions(Direction::Load, engine, regions, count, const_cast<void *>(buffer), bytes,
                        options, job);
}

// ---- llama.cpp sequences -----------------------------------------------------------------------

int32_t kvf_llama_attach(kvf_engine engine, struct llama_context *context,
                         const kvf_llama_options *given, kvf_llama *llama) {
    const auto [error, error_size] = error_place(given);
    return guarded(error, error_size, [&]() -> int32_t {
        require(llama, "llama");
        if (!context) throw Error(KVF_ERR_INVALID_ARGUMENT, "context is NULL");
        const auto options = read_options(given);
        if (options.flags & ~uint32_t{KVF_LLAMA_ALLOW_BLOCKING | KVF_LLAMA_FORCE_BLOCKING}) {
            throw Error(KVF_ERR_INVALID_ARGUMENT, "unknown flags");
        }
        auto made = std::make_shared<Llama>(find<Engine>(engine), context, options);
        const kvf_llama handle = new_handle(ObjectType::Llama);
        publish(handle, std::move(made));
        *llama = handle;
        return KVF_OK;
    });
}

int32_t kvf_llama_describe(kvf_llama llama, char *json, uint64_t capacity, uint64_t *needed) {
    return guarded(
        [&] { return write_text(find<Llama>(llama)->describe(), json, capacity, needed); });
}

int32_t kvf_llama_size(kvf_llama llama, int32_t sequence, uint64_t *bytes) {
    return guarded([&]() -> int32_t {
        require(bytes, "bytes");
        *bytes = find<Llama>(llama)->size(sequence);
        return KVF_OK;
    });
}

int32_t kvf_llama_save(kvf_llama llama, int32_t sequence, void *buffer, uint64_t bytes,
                       const kvf_submit_options *given, kvf_job *job) {
    const auto [error, error_size] = error_place(given);
    return guarded(error, error_size, [&]() -> int32_t {
        const auto options = read_options(given);
        check_submit(options, KVF_SUBMIT_FOLLOW_STREAM);
        check_save_mode(options.mode);
        find<Llama>(llama)->save(sequence, buffer, bytes, options, job);
        return KVF_OK;
    });
}

int32_t kvf_llama_load(kvf_llama llama, int32_t sequence, const void *buffer, uint64_t bytes,
                       const kvf_submit_options *given, kvf_job *job) {
    const auto [error, error_size] = error_place(given);
    return guarded(error, error_size, [&]() -> int32_t {
        const auto options = read_options(given);
        check_submit(options, KVF_SUBMIT_FOLLOW_STREAM | KVF_SUBMIT_TRUST_STATE);
        check_load_mode(options.mode);
        find<Llama>(llama)->load(sequence, buffer, bytes, options, job);
        return KVF_OK;
    });
}

int32_t kvf_llama_blocks_allowed(kvf_llama llama, char *reason, uint64_t capacity) {
    return guarded([&]() -> int32_t {
        if (capacity) require(reason, "reason");
        std::string why;
        const kvf_blocks_allowed allowed = find<Llama>(llama)->blocks_allowed(why);
        copy_text(why, reason, capacity);
        return allowed;
    });
}

int32_t kvf_llama_block_size(kvf_llama llama, uint32_t tokens, uint64_t *bytes) {
    return guarded([&]() -> int32_t {
        require(bytes, "bytes");
        *bytes = find<Llama>(llama)->block_size(tokens);
        return KVF_OK;
    });
}

int32_t kvf_llama_save_blocks(kvf_llama llama, int32_t sequence, kvf_block *blocks,
                              uint64_t block_size, uint32_t count, const kvf_submit_options *given,
                              kvf_job *job) {
    const auto [error, error_size] = error_place(given);
    return guarded(error, error_size, [&]() -> int32_t {
        const auto options = read_options(given);
        check_submit(options, KVF_SUBMIT_FOLLOW_STREAM | KVF_SUBMIT_EACH_BLOCK);
        check_save_mode(options.mode);
        check_somebody_is_told(options);
        BlocksOfCaller all(blocks, block_size, count);
        // Once the job can have ended, the caller may read the sizes, or free the array.
        find<Llama>(llama)->save_blocks(
            sequence, all.blocks, [&] { all.write_sizes(); }, options, job);
        return KVF_OK;
    });
}

int32_t kvf_llama_checkpoint_size(kvf_llama llama, int32_t sequence, uint64_t *bytes) {
    return guarded([&]() -> int32_t {
        require(bytes, "bytes");
        *bytes = find<Llama>(llama)->checkpoint_size(sequence);
        return KVF_OK;
    });
}

int32_t kvf_llama_save_checkpoint(kvf_llama llama, int32_t sequence, void *buffer, uint64_t bytes,
                                  const kvf_submit_options *given, kvf_job *job) {
    const auto [error, error_size] = error_place(given);
    return guarded(error, error_size, [&]() -> int32_t {
        const auto options = read_options(given);
        check_submit(options, KVF_SUBMIT_FOLLOW_STREAM);
        check_save_mode(options.mode);
        find<Llama>(llama)->save_checkpoint(sequence, buffer, bytes, options, job);
        return KVF_OK;
    });
}

int32_t kvf_llama_load_blocks(kvf_llama llama, int32_t sequence, const kvf_block *blocks,
                              uint64_t block_size, uint32_t count, const void *checkpoint,
                              uint64_t checkpoint_bytes, const kvf_submit_options *given,
                              kvf_job *job) {
    const auto [error, error_size] = error_place(given);
    return guarded(error, error_size, [&]() -> int32_t {
        const auto options = read_options(given);
        check_submit(options, KVF_SUBMIT_FOLLOW_STREAM);
        check_load_mode(options.mode);
        const BlocksOfCaller all(const_cast<kvf_block *>(blocks), block_size, count);
        find<Llama>(llama)->load_blocks(sequence, all.blocks, checkpoint, checkpoint_bytes, options,
                                        job);
        return KVF_OK;
    });
}

int32_t kvf_state_cut(const void *state, uint64_t bytes, kvf_block *blocks, uint64_t block_size,
                      uint32_t count, void *checkpoint, uint64_t *checkpoint_bytes,
                      const kvf_state_options *given) {
    const auto [error, error_size] = error_place(given);
    return guarded(error, error_size, [&]() -> int32_t {
        require(state, "state");
        const auto options = read_options(given);
        BlocksOfCaller all(blocks, block_size, count);
        cut_state({static_cast<const unsigned char *>(state), bytes},
                  std::max(options.parts_in_blocks, 1U), all.blocks, checkpoint, checkpoint_bytes);
        return KVF_OK;
    });
}

int32_t kvf_state_join(const kvf_block *blocks, uint64_t block_size, uint32_t count,
                       const void *checkpoint, uint64_t checkpoint_bytes, void *state,
                       uint64_t *state_bytes, const kvf_state_options *given) {
    const auto [error, error_size] = error_place(given);
    return guarded(error, error_size, [&]() -> int32_t {
        require(state_bytes, "state_bytes");
        const auto options = read_options(given);
        const BlocksOfCaller all(const_cast<kvf_block *>(blocks), block_size, count);
        join_state(all.blocks, checkpoint, checkpoint_bytes, std::max(options.parts_in_blocks, 1U),
                   state, state_bytes);
        return KVF_OK;
    });
}

int32_t kvf_llama_remove(kvf_llama llama, int32_t sequence) {
    return guarded([&]() -> int32_t {
        find<Llama>(llama)->remove(sequence);
        return KVF_OK;
    });
}

int32_t kvf_llama_settle(kvf_llama llama) {
    return guarded([&]() -> int32_t { return static_cast<int32_t>(find<Llama>(llama)->settle()); });
}

int32_t kvf_llama_detach(kvf_llama llama) {
    return guarded([&]() -> int32_t {
        find<Llama>(llama)->detach();
        withdraw<Llama>(llama);
        return KVF_OK;
    });
}

} // extern "C"
