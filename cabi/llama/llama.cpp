#include "llama/llama.h"

#include "core/json.h"
#include "states/envelope.h"

namespace kvf {
namespace {

const char kNoTap[] = "blocks need the tap: libllama's calls cannot be recorded";

const char *blocks_word(kvf_blocks_allowed allowed) {
    switch (allowed) {
    case KVF_BLOCKS_UNSEEN: return "unseen";
    case KVF_BLOCKS_NONE: return "none";
    case KVF_BLOCKS_CHECKPOINTS_ALONE: return "checkpoints";
    case KVF_BLOCKS_WITH_CHECKPOINTS: return "blocks+checkpoints";
    case KVF_BLOCKS_ALONE: return "blocks";
    }
    return "none";
}

} // namespace

Llama::Llama(std::shared_ptr<Engine> engine, llama_context *context,
             const kvf_llama_options &options)
    : engine_(std::move(engine)), context_(context, options.library),
      sequences_(LlamaSequences::of(context, context_.model())) {
    engine_->attach();
    try {
        sequences_->check_at_rest();
        for (uint32_t i = 0; i < engine_->device_count(); ++i) engine_->device(i).check_usable();
        tap_ = open_tap(options.flags);
        if (!tap_) blocking_ = std::make_unique<ThreadPool>(1);
        states_ = std::make_unique<KnownStates>(
            context_, *sequences_, tap_ != nullptr,
            [this](Direction direction, const void *buffer, uint64_t bytes) {
                return make_recorder(direction, buffer, bytes, nullptr);
            });
        states_->look_first();
    } catch (...) {
        tap_.reset();
        engine_->detach();
        throw;
    }
}

// NULL where libllama's blocking calls are to be used.
std::unique_ptr<Tap> Llama::open_tap(uint32_t flags) {
    if (flags & KVF_LLAMA_FORCE_BLOCKING) return nullptr;
    try {
        return std::make_unique<Tap>(context_.api(), [this](uint64_t begin, uint64_t bytes) {
            on_buffer_freed(begin, bytes);
        });
    } catch (const Error &error) {
        const bool allowed = flags & KVF_LLAMA_ALLOW_BLOCKING;
        if (error.status != KVF_ERR_TAP || !allowed) throw;
        return nullptr;
    }
}

Llama::~Llama() {
    if (!detached_) release();
}

void Llama::release() {
    std::unique_ptr<Tap> tap;
    {
        std::lock_guard lock(mutex_); // describe() may be looking at it
        tap.swap(tap_);
    }
    tap.reset();
    blocking_.reset();
    engine_->detach();
}

std::string Llama::describe() const {
    std::lock_guard lock(mutex_);
    if (detached_) throw Error(KVF_ERR_INVALID_HANDLE);
    const auto counters = tap_ ? tap_->counters() : Tap::Counters{};
    const CachePolicy policy = states_->policy();
    return "{" + context_.describe() + ", \"cache\": " + json_quote(policy.kind()) +
           ", \"format\": " + json_quote(policy.format_name()) +
           ", \"guarded_by\": " + (policy.seals_states() ? "\"envelope\"" : "\"structure\"") +
           ", \"blocks\": " +
           json_quote(blocks_word(tap_ ? policy.blocks_allowed() : KVF_BLOCKS_NONE)) +
           ", \"why\": " + json_quote(tap_ ? policy.why_not_more_blocks() : kNoTap) +
           format(", \"parts_in_blocks\": %zu", policy.parts_in_blocks()) +
           format(", \"window\": %d", policy.window()) + ", \"default_mode\": " +
           (policy.save_mode(KVF_SAVE_AUTO) == KVF_SAVE_SNAPSHOT ? "\"snapshot\""
                                                                 : "\"in_place\"") +
           ", \"tap\": " + (tap_ ? "true" : "false") +
           format(", \"recorded_calls\": %llu, \"passed_calls\": %llu, \"sequences\": %u}",
                  static_cast<unsigned long long>(counters.recorded),
                  static_cast<unsigned long long>(counters.passed_through),
                  context_.sequence_count());
}

uint64_t Llama::size(int32_t sequence) {
    settle();
    check_usable();
    check_sequence(sequence, Holds::Nothing);
    if (states_->is_unseen() && context_.holds_cells(sequence)) states_->look_at(sequence);
    const uint64_t bytes = context_.state_bytes(sequence);
    if (bytes == 0) throw Error(KVF_ERR_LLAMA, "llama_state_seq_get_size failed");
    return bytes + (states_->policy().seals_states() ? Envelope::kBytes : 0);
}

void Llama::remove(int32_t sequence) {
    settle();
    check_usable();
    check_sequence(sequence, Holds::Nothing);
    sequences_->check_idle(sequence, LlamaSequences::Busy::WithAny);
    states_->empty_sequence(sequence);
}

uint32_t Llama::settle() {
    if (replaced_) return 0;
    const auto sequences = sequences_->take_to_be_emptied();
    for (const int32_t sequence : sequences) states_->empty_sequence(sequence);
    return static_cast<uint32_t>(sequences.size());
}

void Llama::detach() {
    if (engine_->on_dispatch_thread())
        throw Error(KVF_ERR_BUSY, "called from a completion callback");
    {
        std::lock_guard lock(mutex_);
        if (detached_) throw Error(KVF_ERR_INVALID_HANDLE);
        detached_ = true;
    }
    engine_->wait([this](const Job &job) { return job.request.attachment == this; });
    // Where another attachment's blocking transfer is in flight, it is for that attachment to do.
    if (sequences_->is_at_rest()) settle();
    release();
}

// A context that was freed and noticed, or whose memory is plainly something else by now.
void Llama::check_usable() {
    {
        std::lock_guard lock(mutex_);
        if (detached_) throw Error(KVF_ERR_INVALID_HANDLE);
    }
    if (!sequences_->is_freed() && context_.is_replaced()) replaced_ = true;
    if (replaced_ || sequences_->is_freed()) throw Error(KVF_ERR_CONTEXT_FREED);
    sequences_->check_at_rest();
}

// Of a lost device libllama's own calls would end the process, and a load would have cost the
// sequence its cells.
void Llama::check_devices() {
    for (const uint32_t device : devices_) engine_->device(device).check_usable();
    const auto tensor = sequences_->any_tensor();
    if (!tensor) return;
    try {
        Locator locate = engine_->locator();
        locate(*tensor, 1);
    } catch (const Error &error) {
        if (error.status != KVF_ERR_UNREACHABLE) throw;
    }
}

void Llama::check_sequence(int32_t sequence, Holds least) {
    if (sequence < 0 || static_cast<uint32_t>(sequence) >= context_.sequence_count()) {
        throw Error(KVF_ERR_SEQUENCE_RANGE, format("sequence %d; the context has 0 to %u", sequence,
                                                   context_.sequence_count() - 1));
    }
    if (least == Holds::Cells && !states_->holds_cells(sequence))
        throw Error(KVF_ERR_SEQUENCE_EMPTY, format("sequence %d", sequence));
    if (least == Holds::State && !states_->holds_state(sequence))
        throw Error(KVF_ERR_SEQUENCE_EMPTY, format("sequence %d, or a part of it", sequence));
}

// Called by libllama's thread that frees the context, before the memory goes.
void Llama::on_buffer_freed(uint64_t begin, uint64_t bytes) {
    if (!sequences_->note_buffer_freed(begin, bytes)) return;
    const auto ours = [this](const Job &job) { return job.request.attachment == this; };
    engine_->cancel(ours);
    engine_->wait(ours);
}

} // namespace kvf
