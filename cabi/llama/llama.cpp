#include "llama/llama.h"

#include <sys/mman.h>

#include <algorithm>

#include "core/json.h"
#include "llama/envelope.h"

namespace kvf {
namespace {

// So much is moved while the rest is still being recorded. Less is recorded in less time than it takes to begin.
constexpr uint64_t kLeastPart = 4 << 20;

// Identity of the model: all that libllama tells of it, FNV-1a. No public function leads from a model to its
// weights, nor from a context to its adapters. kFingerprintCovers says the same to callers.
std::string fingerprint(const LlamaApi &api, const llama_model *model) {
    uint64_t hash = 0xcbf29ce484222325u;
    const auto mix = [&](std::string_view bytes) {
        for (const unsigned char c : bytes) hash = (hash ^ c) * 0x100000001b3u;
        hash = (hash ^ 0xff) * 0x100000001b3u; // so that "ab", "c" is not "a", "bc"
    };
    char text[1024];
    if (api.model_desc(model, text, sizeof text) >= 0) mix(text);
    mix(std::to_string(api.model_n_params(model)));
    mix(std::to_string(api.model_size(model)));
    const int32_t count = api.model_meta_count(model);
    for (int32_t i = 0; i < count; ++i) {
        if (api.model_meta_key_by_index(model, i, text, sizeof text) >= 0) mix(text);
        if (api.model_meta_val_str_by_index(model, i, text, sizeof text) >= 0) mix(text);
    }
    return format("%016llx", static_cast<unsigned long long>(hash));
}

constexpr const char *kFingerprintCovers =
    R"(["model description", "model size", "number of parameters", "model metadata"])";

std::string describe_model(const LlamaApi &api, const llama_model *model) {
    char text[256] = "";
    api.model_desc(model, text, sizeof text);
    return text;
}

// Address space for a state of which only the few bytes between the tensors will be written.
class ScratchState {
public:
    explicit ScratchState(uint64_t bytes) : bytes_(bytes) {
        void *memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw Error(KVF_ERR_OUT_OF_MEMORY, "mapping a scratch state");
        data = static_cast<unsigned char *>(memory);
    }
    ~ScratchState() {
        if (data) munmap(data, bytes_);
    }
    ScratchState(const ScratchState &) = delete;
    ScratchState &operator=(const ScratchState &) = delete;

    ScratchState(ScratchState &&other) noexcept
        : data(std::exchange(other.data, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

    unsigned char *data;

private:
    uint64_t bytes_;
};

// A position beyond which no state is whole. A conversation may go on for longer than the context has cells, as tokens
// are removed or a window slides on, so the bound is generous; what matters is that decoding can go on from it.
int32_t last_sane_position(const LlamaApi &api, const llama_model *model,
                           const llama_context *context) {
    constexpr int64_t kLeast = 1 << 24, kMost = INT32_MAX - (1 << 24);
    const int64_t trained = std::max(api.model_n_ctx_train(model), 0);
    const int64_t longest = std::max<int64_t>(trained, api.n_ctx(context));
    return static_cast<int32_t>(std::clamp(16 * longest, kLeast, kMost));
}

// Throws KVF_ERR_BUFFER_TOO_SMALL.
void check_room(uint64_t needed, uint64_t given) {
    if (given >= needed) return;
    throw Error(KVF_ERR_BUFFER_TOO_SMALL, format("%llu bytes are needed, %llu were given",
                                                 static_cast<unsigned long long>(needed),
                                                 static_cast<unsigned long long>(given)));
}

// Whether a known format accounts for the state, and every part of it has cells, or none.
bool looks_known(const StateView &view) {
    const auto found = parse_state_in_every_way(view);
    return std::any_of(found.begin(), found.end(), [](const Structure &structure) {
        return structure.cells() == 0 || structure.has_cells_everywhere();
    });
}

} // namespace

// The state of a sequence without its tensor bytes, and what was recorded of these.
struct Llama::Metadata {
    ScratchState state;
    uint64_t bytes;
    Recorded recorded;

    StateView view() const { return {state.data, bytes}; }
};

Llama::Llama(std::shared_ptr<Engine> engine, llama_context *context,
             const kvf_llama_options &options)
    : engine_(std::move(engine)), context_(context), api_(find_llama(options.library)),
      model_(api_.get_model(context)), sequence_count_(api_.n_seq_max(context)),
      sequences_(LlamaSequences::of(context, model_)), model_text_(describe_model(api_, model_)),
      fingerprint_(fingerprint(api_, model_)), window_(api_.model_n_swa(model_)),
      last_position_(last_sane_position(api_, model_, context)) {
    if (!api_.get_memory(context_)) {
        throw Error(KVF_ERR_UNSUPPORTED, "the context has no memory: its model keeps no state");
    }
    engine_->attach();
    try {
        sequences_->check_at_rest();
        for (uint32_t i = 0; i < engine_->device_count(); ++i) engine_->device(i).check_usable();
        if (!(options.flags & KVF_LLAMA_FORCE_BLOCKING)) {
            try {
                tap_ = std::make_unique<Tap>(api_, [this](uint64_t begin, uint64_t bytes) {
                    on_buffer_freed(begin, bytes);
                });
            } catch (const Error &error) {
                const bool allowed = options.flags & KVF_LLAMA_ALLOW_BLOCKING;
                if (error.status != KVF_ERR_TAP || !allowed) throw;
            }
        }
        if (!tap_) blocking_ = std::make_unique<ThreadPool>(1);
        learn_structure(most_telling_sequence());
    } catch (...) {
        tap_.reset();
        engine_->detach();
        throw;
    }
}

Llama::~Llama() {
    if (!detached_) let_go();
}

void Llama::let_go() {
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
    return "{\"library\": " + json_quote(api_.path) +
           ", \"ggml_version\": " + json_quote(api_.ggml.version ? api_.ggml.version() : "") +
           ", \"ggml_commit\": " + json_quote(api_.ggml.commit ? api_.ggml.commit() : "") +
           ", \"model\": " + json_quote(model_text_) +
           ", \"fingerprint\": " + json_quote(fingerprint_) +
           ", \"fingerprint_covers\": " + kFingerprintCovers +
           ", \"cache\": " + json_quote(cache_kind_) + ", \"format\": " + json_quote(format_name_) +
           ", \"guarded_by\": " + (is_opaque() ? "\"envelope\"" : "\"structure\"") +
           format(", \"window\": %d", window_) + ", \"default_mode\": " +
           (resolve_mode(KVF_SAVE_AUTO) == KVF_SAVE_SNAPSHOT ? "\"snapshot\"" : "\"in_place\"") +
           ", \"tap\": " + (tap_ ? "true" : "false") +
           format(", \"recorded_calls\": %llu, \"passed_calls\": %llu, \"sequences\": %u}",
                  static_cast<unsigned long long>(counters.recorded),
                  static_cast<unsigned long long>(counters.passed_through), sequence_count_);
}

uint64_t Llama::size(int32_t sequence) {
    settle();
    check_usable();
    check_sequence(sequence, false);
    if (states_ == States::Unseen && holds_cells(sequence)) learn_structure(sequence);
    const uint64_t bytes = api_.state_seq_get_size(context_, sequence, 0);
    if (bytes == 0) throw Error(KVF_ERR_LLAMA, "llama_state_seq_get_size failed");
    return bytes + (is_opaque() ? Envelope::kBytes : 0);
}

void Llama::save(int32_t sequence, void *buffer, uint64_t bytes, const kvf_submit_options &options,
                 kvf_job *job) {
    Submission submission = begin(Direction::Save, sequence, buffer, bytes, options);
    check_sequence(sequence, true);
    sequences_->check_idle(sequence, LlamaSequences::Busy::WithLoads);
    if (states_ == States::Unseen) learn_structure(sequence);
    submission.mode = resolve_mode(options.mode);
    if (blocking_) return save_blocking(sequence, std::move(submission), options, job);
    if (is_opaque()) return save_opaque(sequence, std::move(submission), options, job);

    auto *const state = static_cast<unsigned char *>(buffer);
    const auto fence = submission.fence;
    const auto gate = submission.gate;
    Recorder recorder = make_recorder(Direction::Save, buffer, bytes, gate);
    bool close = false;
    if (submission.mode == KVF_SAVE_IN_PLACE && window_ > 0) {
        // Which cells others may take only their positions tell, which libllama writes while it lists.
        const auto metadata = record_metadata(sequence);
        const auto structure =
            metadata ? parse_state(metadata->view(), structure_ ? &*structure_ : nullptr)
                     : std::nullopt;
        if (structure) {
            close = guard_window(*structure, metadata->view(), recorder, gate.get());
        } else {
            submission.mode = KVF_SAVE_SNAPSHOT; // what cannot be guarded is copied aside
        }
    }
    const bool in_place = submission.mode == KVF_SAVE_IN_PLACE;
    std::optional<OpenJob> open;
    if (in_place) move_while_recording(recorder, open, submission, options, job != nullptr);
    const uint64_t written = write_state(sequence, state, bytes, recorder);
    Recorded recorded = recorder.finish();
    check_heard_anything(recorder);
    sequences_->note_tensors(recorder.tensors());
    recorded.bytes = written;
    if (in_place) {
        fence->raise(enclosure(Direction::Save, sequence, recorder, close));
        move_now(Direction::Save, state, written, recorder.take_early(), nullptr);
    }
    if (open) return open->commit(std::move(recorded), job);
    submission.buffer_bytes = written;
    if (submission.mode == KVF_SAVE_SNAPSHOT && !take_snapshot(submission, recorded)) {
        // Device memory is short. What remains safe is to move the bytes while the caller waits.
        submission.mode = KVF_SAVE_IN_PLACE;
        kvf_submit_options urgent = options;
        urgent.priority = KVF_PRIORITY_URGENT;
        submit_job(*engine_, std::move(submission), std::move(recorded), urgent, job)
            ->wait(KVF_FOREVER, nullptr);
        return;
    }
    submit_job(*engine_, std::move(submission), std::move(recorded), options, job);
}

// Where the format is not known, nothing is known of what may be done to the cache meanwhile either: the bytes are
// moved while the caller waits, and the envelope needs them all.
void Llama::save_opaque(int32_t sequence, Submission &&submission,
                        const kvf_submit_options &options, kvf_job *job) {
    const uint64_t needed = api_.state_seq_get_size(context_, sequence, 0);
    check_room(needed + Envelope::kBytes, submission.buffer_bytes);
    unsigned char *const state = submission.buffer;
    Recorder recorder = make_recorder(Direction::Save, state, needed, submission.gate);
    const uint64_t written = write_state(sequence, state, needed, recorder);
    Recorded recorded = recorder.finish();
    check_heard_anything(recorder);
    sequences_->note_tensors(recorder.tensors());
    move_now(Direction::Save, state, written, std::exchange(recorded.layouts, {}),
             submission.gate.get());
    Envelope::seal(state, written, fingerprint_number());
    recorded.bytes = written + Envelope::kBytes;
    submission.mode = KVF_SAVE_SNAPSHOT;
    complete(std::move(submission), std::move(recorded), options, job);
}

// Copies aside what the submission would read. False where there is no room for it.
bool Llama::take_snapshot(Submission &submission, Recorded &recorded) {
    if (submission.gate) submission.gate->wait();
    try {
        for (auto &[device, layout] : recorded.layouts) {
            auto snapshot = engine_->device(device).snapshot(layout, submission.buffer);
            layout = std::move(snapshot.layout);
            if (snapshot.memory) submission.keep_alive.push_back(std::move(snapshot.memory));
        }
        return true;
    } catch (const Error &error) {
        if (error.status != KVF_ERR_OUT_OF_MEMORY) throw;
        return false;
    }
}

void Llama::load(int32_t sequence, const void *buffer, uint64_t bytes,
                 const kvf_submit_options &options, kvf_job *job) {
    Submission submission = begin(Direction::Load, sequence, buffer, bytes, options);
    check_sequence(sequence, false);
    sequences_->check_idle(sequence, LlamaSequences::Busy::WithAny);
    const auto *const given = static_cast<const unsigned char *>(buffer);
    if (states_ == States::Unseen) learn_structure_of_any();
    // What the stream still writes must not be read before.
    if (submission.gate && may_be_written_by_stream(buffer, bytes)) submission.gate->wait();
    // An envelope is verified here, which reads the whole state.
    const bool sealed = is_opaque() || Envelope::is_on(given, bytes);
    if (sealed && submission.gate) submission.gate->wait();
    Incoming state = examine(sequence, given, bytes, options.flags);

    // From here on whatever fails leaves the sequence empty. libllama empties it itself, but only in those parts of
    // the cache of which the state has cells: a state without any would leave what was there.
    if (!state.structure || !state.structure->has_cells_everywhere()) {
        empty_sequence(sequence);
        if (empty_bytes_ == 0) empty_bytes_ = api_.state_seq_get_size(context_, sequence, 0);
    }
    submission.buffer_bytes = state.view.bytes;
    if (blocking_) {
        return load_blocking(sequence, std::move(state), std::move(submission), options, job);
    }
    try {
        if (state.structure) {
            load_recorded(sequence, state, std::move(submission), options, job);
        } else {
            load_opaque(sequence, state, std::move(submission), options, job);
        }
    } catch (...) {
        empty_sequence(sequence);
        throw;
    }
}

void Llama::load_recorded(int32_t sequence, const Incoming &state, Submission &&submission,
                          const kvf_submit_options &options, kvf_job *job) {
    const StateView &view = state.view;
    unsigned char *const buffer = submission.buffer;
    const auto fence = submission.fence;
    const auto gate = submission.gate;
    Recorder recorder = make_recorder(Direction::Load, view.data, view.bytes, gate);
    const bool close = guard_window(*state.structure, view, recorder, gate.get());
    std::optional<OpenJob> open;
    uint32_t device = Device::kHost;
    const auto load_ahead = make_load_ahead(options.mode, view.bytes, device);
    submission.mode = load_ahead ? KVF_LOAD_AHEAD : KVF_LOAD_IN_PLACE;
    if (load_ahead) {
        open.emplace(*engine_, std::move(submission), options, job != nullptr);
        open->stage(device, load_ahead);
    } else {
        move_while_recording(recorder, open, submission, options, job != nullptr);
    }
    if (!read_state(sequence, view, recorder)) {
        open.reset(); // nothing may move any more when the sequence gives up its cells
        throw load_failure(sequence, recorder.abort_text(), state.structure);
    }
    Recorded recorded = recorder.finish();
    if (holds_cells(sequence)) check_heard_anything(recorder);
    sequences_->note_tensors(recorder.tensors());
    check_recorded_whole(*state.structure, recorded);
    learn(*state.structure);
    recorded.bytes = view.bytes;
    fence->raise(enclosure(Direction::Load, sequence, recorder, close));
    move_now(Direction::Load, buffer, view.bytes, recorder.take_early(), nullptr);
    // What was not known before: the device has nothing of the cache.
    if (load_ahead && !devices_.count(device)) recorded.mode = KVF_LOAD_IN_PLACE;
    if (open) {
        open->commit(std::move(recorded), job);
    } else {
        submit_job(*engine_, std::move(submission), std::move(recorded), options, job);
    }
}

// As for a save: the bytes are moved while the caller waits.
void Llama::load_opaque(int32_t sequence, const Incoming &state, Submission &&submission,
                        const kvf_submit_options &options, kvf_job *job) {
    const StateView &view = state.view;
    Recorder recorder = make_recorder(Direction::Load, view.data, view.bytes, submission.gate);
    if (!read_state(sequence, view, recorder)) {
        throw load_failure(sequence, recorder.abort_text(), std::nullopt);
    }
    Recorded recorded = recorder.finish();
    if (holds_cells(sequence)) check_heard_anything(recorder);
    sequences_->note_tensors(recorder.tensors());
    move_now(Direction::Load, submission.buffer, view.bytes, std::exchange(recorded.layouts, {}),
             submission.gate.get());
    recorded.bytes = view.bytes;
    submission.mode = KVF_LOAD_IN_PLACE;
    complete(std::move(submission), std::move(recorded), options, job);
}

// Sees to it that no other sequence gets a cell whose bytes are still to be moved. They are moved before the call
// returns. Where they follow a stream that cannot be: then true, and the fence must be close, so that decoding waits.
bool Llama::guard_window(const Structure &structure, const StateView &view, Recorder &recorder,
                         const Gate *gate) const {
    auto ranges = bytes_free_for_others(structure, view, window_);
    if (gate) return !ranges.empty();
    recorder.set_early(std::move(ranges));
    return false;
}

// What has to stay as it is until the transfer that was recorded has ended.
Enclosure Llama::enclosure(Direction direction, int32_t sequence, const Recorder &recorder,
                           bool close) const {
    Enclosure enclosure;
    enclosure.memory = recorder.memory();
    enclosure.close = close;
    enclosure.context = context_;
    enclosure.is_disturbed = watch(direction, sequence);
    // Of several kinds of attention cells the graph does not tell which rows it means; and the cells that leave a window
    // have been moved already.
    if (structure_ && window_ == 0 && structure_->has_one_attention_first()) {
        enclosure.rows = recorder.first_tensor();
        enclosure.row_bytes = structure_->sections[0].tensors[0].row;
    }
    return enclosure;
}

// Says whether the sequence has been changed since, as far as its first and last position tell.
std::function<bool()> Llama::watch(Direction direction, int32_t sequence) const {
    const llama_memory memory = api_.get_memory(context_);
    const auto first_position = api_.memory_seq_pos_min;
    const auto last_position = api_.memory_seq_pos_max;
    // A window's first cells go to other sequences in the course of things.
    const bool keeps_first = window_ == 0;
    const bool may_append = direction == Direction::Save && appends_only_;
    return [=, first = first_position(memory, sequence), last = last_position(memory, sequence)] {
        const int32_t now = last_position(memory, sequence);
        if (may_append ? now < last : now != last) return true;
        return keeps_first && first_position(memory, sequence) != first;
    };
}

// Moves what must not be moved later, while the caller waits. Throws where it did not end well.
void Llama::move_now(Direction direction, unsigned char *buffer, uint64_t bytes, Layouts &&layouts,
                     Gate *gate) {
    if (layouts.empty()) return;
    if (gate) gate->wait();
    Submission submission;
    submission.submitted_ns = now_ns();
    submission.direction = direction;
    submission.buffer = buffer;
    submission.buffer_bytes = bytes;
    submission.attachment = this;
    Recorded recorded;
    recorded.layouts = std::move(layouts);
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.priority = KVF_PRIORITY_URGENT;
    kvf_completion done;
    submit_job(*engine_, std::move(submission), std::move(recorded), options, nullptr)
        ->wait(KVF_FOREVER, &done);
    if (done.status != KVF_OK) throw Error(done.status, done.detail);
}

// A job that has nothing left to move.
void Llama::complete(Submission &&submission, Recorded &&recorded,
                     const kvf_submit_options &options, kvf_job *job) {
    submit_job(*engine_, std::move(submission), std::move(recorded), options, job);
}

// Returns device memory to load a state ahead, and on which device it is. NULL where the load is done in place.
std::shared_ptr<LoadAhead> Llama::make_load_ahead(uint32_t mode, uint64_t bytes, uint32_t &device) {
    if (mode != KVF_LOAD_AHEAD) return nullptr;
    std::set<uint32_t> devices(devices_);
    devices.erase(Device::kHost);
    // Nothing is known of a context in which no sequence had cells yet.
    if (devices_.empty() && engine_->device_count() == 2) devices.insert(1);
    if (devices.size() != 1) return nullptr;
    device = *devices.begin();
    return engine_->device(device).make_load_ahead(bytes);
}

void Llama::remove(int32_t sequence) {
    settle();
    check_usable();
    check_sequence(sequence, false);
    sequences_->check_idle(sequence, LlamaSequences::Busy::WithAny);
    empty_sequence(sequence);
}

uint32_t Llama::settle() {
    if (replaced_) return 0;
    const auto sequences = sequences_->take_to_be_emptied();
    for (const int32_t sequence : sequences) empty_sequence(sequence);
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
    let_go();
}

// ---- what has to hold before a transfer --------------------------------------------------------

Submission Llama::begin(Direction direction, int32_t sequence, const void *buffer, uint64_t bytes,
                        const kvf_submit_options &options) {
    Submission submission;
    submission.submitted_ns = now_ns();
    settle();
    check_usable();
    engine_->check(options); // what is wrong with them must not cost a sequence its cells
    if (tap_) tap_->renew_slots();
    Fence::wait_for_disturbed(context_);
    if (!buffer || bytes == 0) throw Error(KVF_ERR_INVALID_ARGUMENT, "buffer is NULL or empty");
    if (!MappedCheck()(reinterpret_cast<uint64_t>(buffer), bytes)) {
        throw Error(KVF_ERR_INVALID_ARGUMENT, "the buffer is not mapped memory");
    }
    if (direction == Direction::Save &&
        !WritableCheck()(reinterpret_cast<uint64_t>(buffer), bytes)) {
        throw Error(KVF_ERR_INVALID_ARGUMENT, "the buffer cannot be written");
    }
    check_devices();
    DeviceSet moved = 0;
    for (const uint32_t device : devices_) moved |= device_set(device);
    submission.gate = engine_->make_gate(options, moved);
    for (const uint32_t device : devices_) engine_->device(device).announce(direction);
    submission.direction = direction;
    submission.buffer = static_cast<unsigned char *>(const_cast<void *>(buffer));
    submission.buffer_bytes = bytes;
    submission.attachment = this;
    const LlamaSequences::Transfer transfer{sequence, direction, blocking_ != nullptr};
    submission.fence = std::make_shared<Fence>(direction);
    submission.on_entry = [sequences = sequences_, transfer] { sequences->begin(transfer); };
    submission.on_end = [sequences = sequences_, transfer,
                         fence = submission.fence](int32_t status) {
        fence->lower();
        sequences->end(transfer, status);
    };
    return submission;
}

// A copy engine or a kernel that a stream has been given writes to pinned memory alone.
bool Llama::may_be_written_by_stream(const void *buffer, uint64_t bytes) const {
    const auto pinner = engine_->pinner();
    return pinner && pinner->is_pinned(buffer, bytes);
}

// A context that was freed and noticed, or whose memory is plainly something else by now. (The latter
// reads freed memory: it is a chance to stop in time, not a guarantee.)
void Llama::check_usable() {
    {
        std::lock_guard lock(mutex_);
        if (detached_) throw Error(KVF_ERR_INVALID_HANDLE);
    }
    if (!sequences_->is_freed() && api_.get_model(context_) != model_) replaced_ = true;
    if (replaced_ || sequences_->is_freed()) throw Error(KVF_ERR_CONTEXT_FREED);
    sequences_->check_at_rest();
}

// Of a lost device libllama's own calls would end the process, and a load would have cost the sequence its cells.
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

void Llama::check_sequence(int32_t sequence, bool must_hold_cells) {
    if (sequence < 0 || static_cast<uint32_t>(sequence) >= sequence_count_) {
        throw Error(KVF_ERR_SEQUENCE_RANGE,
                    format("sequence %d; the context has 0 to %u", sequence, sequence_count_ - 1));
    }
    if (must_hold_cells && !holds_cells(sequence)) {
        throw Error(KVF_ERR_SEQUENCE_EMPTY, format("sequence %d", sequence));
    }
}

bool Llama::holds_cells(int32_t sequence) const {
    return api_.memory_seq_pos_max(api_.get_memory(context_), sequence) >= 0;
}

// ---- whether a state may be loaded -------------------------------------------------------------

// Throws, and then nothing has been changed.
Llama::Incoming Llama::examine(int32_t sequence, const unsigned char *state, uint64_t bytes,
                               uint32_t flags) {
    if (is_opaque()) return examine_opaque(state, bytes, flags);
    const StateView view{state, bytes, last_position_};
    // Another version of kvferry may have found this cache opaque, or this context not have seen a cell yet.
    if (Envelope::is_on(state, bytes)) {
        Incoming sealed = examine_opaque(state, bytes, flags);
        if (states_ == States::Known) sealed.structure = examine_known(sealed.view);
        return sealed;
    }
    if (states_ == States::Known) return {view, examine_known(view)};
    if (flags & KVF_SUBMIT_TRUST_STATE && !looks_known(view)) return {view, std::nullopt};
    return {view, examine_first(sequence, view)};
}

Structure Llama::examine_known(const StateView &view) const {
    auto structure = parse_state(view, &*structure_);
    if (!structure) structure = parse_state(view);
    if (!structure) throw Error(KVF_ERR_STATE_DAMAGED);
    const std::string why = mismatch(*structure, *structure_);
    if (!why.empty()) throw Error(KVF_ERR_STATE_MISMATCH, why);
    if (structure->cells() == 0) return std::move(*structure);
    if (structure->cells() > most_cells())
        throw Error(KVF_ERR_CACHE_FULL, describe_cells(*structure));
    // libllama takes such a state, and then has a sequence that is empty in one part and takes cells in another.
    if (lacks_cells(*structure))
        throw Error(KVF_ERR_STATE_DAMAGED, "it has cells for a part of the memory only");
    check_positions(*structure, view);
    return std::move(*structure);
}

// libllama would take it, and then go on with some layers where others have not been.
void Llama::check_positions(const Structure &structure, const StateView &view) const {
    if (!positions_agree_ || positions_agree(structure, view)) return;
    throw Error(KVF_ERR_STATE_DAMAGED, "its parts have cells at different positions");
}

// The last position of a sequence has a cell in every part of the memory, but for a window from which it has been
// removed.
bool Llama::lacks_cells(const Structure &structure) const {
    bool first = true;
    for (const Section &section : structure.sections) {
        const bool may_be_empty = !first && section.kind == Section::Kind::Attention && window_ > 0;
        if (section.cells == 0 && !may_be_empty) return true;
        first = false;
    }
    return false;
}

// The first state with cells that this context gets to see comes from outside. What it is written in is believed only
// when libllama has taken one cell of it and written it again.
Structure Llama::examine_first(int32_t sequence, const StateView &view) {
    const Structure *const skeleton = structure_ ? &*structure_ : nullptr;
    auto candidates = parse_state_in_every_way(view, skeleton);
    if (candidates.empty()) {
        const auto other = parse_state(view);
        if (!other) throw Error(KVF_ERR_STATE_DAMAGED);
        const std::string why = skeleton ? mismatch(*other, *skeleton) : "";
        throw Error(KVF_ERR_STATE_MISMATCH, why);
    }
    for (Structure &candidate : candidates) {
        if (candidate.cells() == 0) return std::move(candidate);
        if (!candidate.has_cells_everywhere()) {
            throw Error(KVF_ERR_STATE_DAMAGED, "it has cells for a part of the memory only");
        }
        check_positions(candidate, view);
        if (!takes_format_of(sequence, candidate)) continue;
        learn(candidate);
        return std::move(candidate);
    }
    throw Error(KVF_ERR_STATE_MISMATCH,
                format("this context does not take states of its structure (format \"%s\")",
                       candidates.front().format->name));
}

// Tries it with a state of one cell, into an empty sequence of an empty context, which is empty again afterwards.
bool Llama::takes_format_of(int32_t sequence, const Structure &candidate) {
    const auto one_cell = make_state_of_one_cell(candidate);
    const StateView view{one_cell.data(), one_cell.size(), last_position_};
    Recorder recorder = make_recorder(Direction::Load, view.data, view.bytes, nullptr);
    try {
        const bool takes = read_state(sequence, view, recorder) && writes_as(sequence, candidate);
        empty_sequence(sequence);
        return takes;
    } catch (...) {
        empty_sequence(sequence); // the cell must not stay
        throw;
    }
}

// Whether libllama writes a state of one cell as the candidate has it.
bool Llama::writes_as(int32_t sequence, const Structure &candidate) {
    const auto written = record_metadata(sequence);
    if (!written || written->bytes != make_state_of_one_cell(candidate).size()) return false;
    const auto structure = parse_state(written->view(), &candidate);
    return structure && structure->format == candidate.format &&
           mismatch(*structure, candidate).empty();
}

Llama::Incoming Llama::examine_opaque(const unsigned char *state, uint64_t bytes,
                                      uint32_t flags) const {
    if (!Envelope::is_on(state, bytes)) {
        if (flags & KVF_SUBMIT_TRUST_STATE) return {{state, bytes, last_position_}, std::nullopt};
        throw Error(KVF_ERR_STATE_DAMAGED,
                    "the format of this cache's states is not known, and nothing else vouches for "
                    "one without kvferry's envelope");
    }
    const auto verdict = Envelope::verify(state, bytes, fingerprint_number());
    if (verdict.foreign) throw Error(KVF_ERR_STATE_MISMATCH, verdict.why);
    if (verdict.damaged) throw Error(KVF_ERR_STATE_DAMAGED, verdict.why);
    return {{state, bytes - Envelope::kBytes, last_position_}, std::nullopt};
}

uint32_t Llama::resolve_mode(uint32_t mode) const {
    if (mode != KVF_SAVE_AUTO) return mode;
    return appends_only_ ? KVF_SAVE_IN_PLACE : KVF_SAVE_SNAPSHOT;
}

// ---- recording ---------------------------------------------------------------------------------

// Has libllama write the state, whose tensor bytes the recorder notes. Returns the bytes of the whole.
uint64_t Llama::write_state(int32_t sequence, unsigned char *buffer, uint64_t bytes,
                            Recorder &recorder) {
    uint64_t written = 0;
    try {
        Recording recording(recorder);
        written = api_.state_seq_get_data(context_, buffer, bytes, sequence, 0);
    } catch (...) {
        written = 0; // an assertion that libllama did not catch itself
    }
    if (written > 0) return written;
    if (!recorder.abort_text().empty()) throw Error(KVF_ERR_LLAMA, recorder.abort_text());
    check_room(api_.state_seq_get_size(context_, sequence, 0), bytes);
    throw Error(KVF_ERR_LLAMA, "llama_state_seq_get_data failed");
}

// Has libllama take the state, whose tensor bytes the recorder notes. False where it did not take all of it.
bool Llama::read_state(int32_t sequence, const StateView &view, Recorder &recorder) {
    try {
        Recording recording(recorder);
        return api_.state_seq_set_data(context_, view.data, view.bytes, sequence, 0) == view.bytes;
    } catch (...) {
        if (recorder.abort_text().empty()) throw;
        return false; // an assertion that libllama did not catch itself
    }
}

Recorder Llama::make_recorder(Direction direction, const void *buffer, uint64_t bytes,
                              std::shared_ptr<Gate> gate) {
    const auto locate = [this, direction, gate = std::move(gate), locator = engine_->locator(),
                         last = int64_t{-1}](uint64_t address, uint64_t count) mutable -> int64_t {
        try {
            const uint32_t device = locator(address, count).device;
            if (device != last) engine_->device(device).announce(direction);
            devices_.insert(device);
            return last = device;
        } catch (const Error &error) {
            if (error.status != KVF_ERR_UNREACHABLE) throw;
            if (gate) gate->wait(); // what moves here and now follows, too
            return -1;
        }
    };
    return Recorder(direction, buffer, bytes, static_cast<uint32_t>(engine_->device_count()),
                    locate, blocks_);
}

// Lets the job in with the first part that libllama names, and moves that while libllama names the others. What
// fails later takes the job back. Submission, options and recorder must outlive the recording.
void Llama::move_while_recording(Recorder &recorder, std::optional<OpenJob> &open,
                                 Submission &submission, const kvf_submit_options &options,
                                 bool with_handle) {
    const auto sink = [this, &open, &submission, &options, with_handle](uint32_t device,
                                                                        Layout &&part) {
        if (!open) open.emplace(*engine_, std::move(submission), options, with_handle);
        open->add(device, std::move(part));
    };
    recorder.set_sink(sink, kLeastPart);
}

// A sequence with cells has tensor bytes. That none were heard of means that calls go past the tap: libllama has moved
// everything itself, while the caller waited.
void Llama::check_heard_anything(const Recorder &recorder) {
    if (!recorder.tensors().empty()) return;
    throw Error(KVF_ERR_TAP,
                "the tap recorded nothing: somebody else has put functions into libllama's slots");
}

// What libllama did not move through the tap has been moved already, or not at all.
void Llama::check_recorded_whole(const Structure &structure, const Recorded &recorded) {
    if (structure.tensor_bytes != recorded.bytes) {
        throw Error(KVF_ERR_TAP, "libllama moved tensor bytes in a way that was not recorded");
    }
}

// With the tap a sequence that holds cells, for it tells most and costs nothing. Without it an empty
// one where there is one, since a state is then copied whole to look at it.
int32_t Llama::most_telling_sequence() const {
    for (uint32_t i = 0; i < sequence_count_; ++i) {
        const auto sequence = static_cast<int32_t>(i);
        const bool empty = api_.memory_seq_pos_max(api_.get_memory(context_), sequence) < 0;
        if (empty == !tap_) return sequence;
    }
    return 0;
}

// What libllama writes for a sequence, without moving its tensor bytes (but without the tap they are copied). Nothing
// where it refuses.
std::optional<Llama::Metadata> Llama::record_metadata(int32_t sequence) {
    const uint64_t bytes = api_.state_seq_get_size(context_, sequence, 0);
    if (bytes == 0) return std::nullopt;
    ScratchState scratch(bytes);
    Recorder recorder = make_recorder(Direction::Save, scratch.data, bytes, nullptr);
    uint64_t written = 0;
    try {
        Recording recording(recorder);
        written = api_.state_seq_get_data(context_, scratch.data, bytes, sequence, 0);
    } catch (...) {
        return std::nullopt;
    }
    if (written == 0) return std::nullopt;
    Recorded recorded = recorder.finish(); // throws what went wrong
    sequences_->note_tensors(recorder.tensors());
    return Metadata{std::move(scratch), written, std::move(recorded)};
}

// Looks at the structure of a sequence's state. An empty sequence tells the kind of the cache, one with
// cells its types and row sizes too; and whether a known format describes it.
void Llama::learn_structure(int32_t sequence) {
    const auto metadata = record_metadata(sequence);
    if (!metadata) return;
    if (is_frame_alone(metadata->view())) {
        throw Error(KVF_ERR_UNSUPPORTED,
                    "the context uses the cells of another context, which saves and loads "
                    "them: attach to that one");
    }
    const bool empty = !holds_cells(sequence);
    auto found = parse_state_in_every_way(metadata->view(), structure_ ? &*structure_ : nullptr);
    // libllama calls a sequence empty of which only the window is. Such a one tells nothing.
    if (empty && std::any_of(found.begin(), found.end(),
                             [](const Structure &structure) { return structure.cells() > 0; })) {
        return;
    }
    if (empty) empty_bytes_ = metadata->bytes;
    // The tap knows how many bytes are those of tensors; without it, they cannot be told apart.
    std::erase_if(found, [&](const Structure &structure) {
        if (empty != (structure.cells() == 0)) return true;
        // A format that is not known can look like a known one of more parts, of which some are empty.
        if (!empty && lacks_cells(structure)) return true;
        return tap_ && structure.tensor_bytes != metadata->recorded.bytes;
    });
    if (found.empty()) {
        if (!empty && tap_ && metadata->recorded.bytes == 0)
            throw Error(KVF_ERR_TAP, "libllama moved tensor bytes in a way that was not recorded");
        return learn_that_opaque();
    }
    if (!empty && !positions_agree(found.front(), metadata->view())) positions_agree_ = false;
    learn(found.front());
}

// By a sequence that has cells, if there is one.
void Llama::learn_structure_of_any() {
    for (uint32_t i = 0; i < sequence_count_ && states_ == States::Unseen; ++i) {
        const auto sequence = static_cast<int32_t>(i);
        if (holds_cells(sequence)) learn_structure(sequence);
    }
}

void Llama::learn(const Structure &structure) {
    if (!structure_) {
        structure_ = structure;
        const bool has_recurrent = structure.kind().find("recurrent") != std::string::npos;
        std::lock_guard lock(mutex_);
        cache_kind_ = structure.kind();
        // Attention alone only appends. A window is overwritten as it slides.
        appends_only_ = !has_recurrent && !api_.model_is_recurrent(model_) &&
                        !(api_.model_is_hybrid && api_.model_is_hybrid(model_)) && window_ == 0;
    } else if (structure_->sections.size() == structure.sections.size()) {
        for (size_t i = 0; i < structure.sections.size(); ++i) {
            if (structure_->sections[i].cells == 0) structure_->sections[i] = structure.sections[i];
        }
        if (!structure_->format) structure_->format = structure.format;
    }
    if (!structure_->format || !structure_->has_cells_everywhere()) return;
    std::lock_guard lock(mutex_);
    states_ = States::Known;
    format_name_ = structure_->format->name;
}

void Llama::learn_that_opaque() {
    structure_.reset();
    std::lock_guard lock(mutex_);
    states_ = States::Opaque;
    cache_kind_ = "unknown";
    format_name_ = "opaque";
    appends_only_ = false;
}

// ---- failure -----------------------------------------------------------------------------------

void Llama::empty_sequence(int32_t sequence) {
    sequences_->forget(sequence);
    api_.memory_seq_rm(api_.get_memory(context_), sequence, -1, -1);
}

// libllama refused a state that looks whole. It says why in its log only; this finds out as much as the program's
// next step depends on.
Error Llama::load_failure(int32_t sequence, const std::string &abort_text,
                          const std::optional<Structure> &state) {
    empty_sequence(sequence); // it may hold a part of the state
    const std::string left = what_is_left(sequence);
    if (!abort_text.empty()) return Error(KVF_ERR_LLAMA, abort_text + left);
    if (!state) return Error(KVF_ERR_LLAMA, "it did not take the state" + left);
    return Error(KVF_ERR_CACHE_FULL, describe_cells(*state) + left);
}

std::string Llama::describe_cells(const Structure &state) const {
    return format("the state has %llu cells; a sequence may have %u",
                  static_cast<unsigned long long>(state.cells()), most_cells());
}

uint32_t Llama::most_cells() const {
    return api_.n_ctx_seq ? api_.n_ctx_seq(context_) : api_.n_ctx(context_);
}

// What libllama has left of a load that failed and that removing the sequence did not remove, in words.
std::string Llama::what_is_left(int32_t sequence) const {
    const bool clean =
        !holds_cells(sequence) &&
        (empty_bytes_ == 0 || api_.state_seq_get_size(context_, sequence, 0) == empty_bytes_);
    return clean ? "" : "; it left cells behind that only llama_memory_clear() frees";
}

// Called by libllama's thread that frees the context, before the memory goes.
void Llama::on_buffer_freed(uint64_t begin, uint64_t bytes) {
    if (!sequences_->note_buffer_freed(begin, bytes)) return;
    const auto ours = [this](const Job &job) { return job.request.attachment == this; };
    engine_->cancel(ours);
    engine_->wait(ours);
}

// ---- without the tap: libllama's blocking calls, on a thread of ours ---------------------------

void Llama::save_blocking(int32_t sequence, Submission &&submission,
                          const kvf_submit_options &options, kvf_job *job) {
    const uint64_t state_bytes = api_.state_seq_get_size(context_, sequence, 0);
    const uint64_t needed = state_bytes + (is_opaque() ? Envelope::kBytes : 0);
    check_room(needed, submission.buffer_bytes);
    submission.buffer_bytes = needed;
    submission.mode = KVF_SAVE_IN_PLACE; // the context must rest anyway
    run_blocking(
        std::move(submission), needed, options, job, [this, sequence, state_bytes](Job &started) {
            const size_t n =
                api_.state_seq_get_data(context_, started.request.buffer, state_bytes, sequence, 0);
            if (n != state_bytes) {
                started.fail(KVF_ERR_LLAMA, "llama_state_seq_get_data failed");
            } else if (is_opaque()) {
                Envelope::seal(started.request.buffer, state_bytes, fingerprint_number());
            }
        });
}

void Llama::load_blocking(int32_t sequence, Incoming &&state, Submission &&submission,
                          const kvf_submit_options &options, kvf_job *job) {
    const uint64_t bytes = state.view.bytes;
    const auto load = [this, sequence, bytes,
                       structure = std::move(state.structure)](Job &started) {
        const size_t n =
            api_.state_seq_set_data(context_, started.request.buffer, bytes, sequence, 0);
        if (n == bytes) return;
        try {
            // The context rests, so what belongs to its thread may be looked at here.
            throw load_failure(sequence, "", structure);
        } catch (const Error &failure) {
            started.fail(failure.status, failure.detail);
        }
    };
    submission.mode = KVF_LOAD_IN_PLACE;
    run_blocking(std::move(submission), bytes, options, job, load);
}

void Llama::run_blocking(Submission &&submission, uint64_t bytes, const kvf_submit_options &options,
                         kvf_job *handle, std::function<void(Job &)> work) {
    OpenJob open(*engine_, std::move(submission), options, handle != nullptr);
    const auto job = open.job();
    job->begin_work(); // of a kind: the thread's
    try {
        blocking_->add([job, work = std::move(work)] {
            job->wait_for_gate();
            if (!job->stopping()) {
                job->note_started(now_ns());
                work(*job);
            }
            job->end_work();
        });
    } catch (...) {
        job->end_work();
        throw;
    }
    Recorded recorded;
    recorded.bytes = bytes;
    open.commit(std::move(recorded), handle);
}

} // namespace kvf
