#include "llama.h"

#include <sys/mman.h>

#include "json.h"

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
    ~ScratchState() { munmap(data, bytes_); }
    ScratchState(const ScratchState &) = delete;
    ScratchState &operator=(const ScratchState &) = delete;

    unsigned char *data;

private:
    const uint64_t bytes_;
};

} // namespace

Llama::Llama(std::shared_ptr<Engine> engine, llama_context *context,
             const kvf_llama_options &options)
    : engine_(std::move(engine)), context_(context), api_(find_llama(options.library)),
      model_(api_.get_model(context)), sequence_count_(api_.n_seq_max(context)),
      sequences_(LlamaSequences::of(context, model_)), model_text_(describe_model(api_, model_)),
      fingerprint_(fingerprint(api_, model_)) {
    if (!api_.get_memory(context_)) {
        throw Error(KVF_ERR_UNSUPPORTED, "the context has no memory: its model keeps no state");
    }
    engine_->hold();
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
        if (!tap_) blocking_ = std::make_unique<Crew>(1);
        learn_structure(most_telling_sequence());
    } catch (...) {
        tap_.reset();
        engine_->let_go();
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
    engine_->let_go();
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
           ", \"cache\": " + json_quote(cache_kind_) + ", \"default_mode\": " +
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
    const uint64_t bytes = api_.state_seq_get_size(context_, sequence, 0);
    if (bytes == 0) throw Error(KVF_ERR_LLAMA, "llama_state_seq_get_size failed");
    return bytes;
}

void Llama::save(int32_t sequence, void *buffer, uint64_t bytes, const kvf_submit_options &options,
                 kvf_job *job) {
    Submission submission = begin(Direction::Save, sequence, buffer, bytes, options);
    check_sequence(sequence, true);
    sequences_->check_idle(sequence, LlamaSequences::Busy::WithLoads);
    submission.mode = resolve_mode(options.mode);
    if (blocking_) return save_blocking(sequence, std::move(submission), options, job);

    Recorder recorder = make_recorder(Direction::Save, buffer, bytes, submission.gate);
    std::optional<OpenJob> open;
    if (submission.mode == KVF_SAVE_IN_PLACE) {
        move_while_recording(recorder, open, submission, options, job != nullptr);
    }
    uint64_t written = 0;
    try {
        Recording recording(recorder);
        written =
            api_.state_seq_get_data(context_, static_cast<uint8_t *>(buffer), bytes, sequence, 0);
    } catch (...) {
        written = 0; // an assertion that libllama did not catch itself
    }
    if (written == 0) {
        if (!recorder.abort_text().empty()) throw Error(KVF_ERR_LLAMA, recorder.abort_text());
        const uint64_t needed = api_.state_seq_get_size(context_, sequence, 0);
        if (bytes >= needed) throw Error(KVF_ERR_LLAMA, "llama_state_seq_get_data failed");
        throw Error(KVF_ERR_BUFFER_TOO_SMALL, format("%llu bytes are needed, %llu were given",
                                                     static_cast<unsigned long long>(needed),
                                                     static_cast<unsigned long long>(bytes)));
    }
    Recorded recorded = recorder.finish();
    sequences_->note_tensors(recorder.tensors());
    if (!knows_cells()) {
        if (const auto structure = parse_state(static_cast<unsigned char *>(buffer), written)) {
            check_recorded_whole(*structure, recorded);
            learn(*structure);
        }
    }
    recorded.bytes = written;
    if (open) return open->commit(std::move(recorded), job);
    submission.buffer_bytes = written;
    if (submission.mode == KVF_SAVE_SNAPSHOT && !take_snapshot(submission, recorded)) {
        // Device memory is short. What remains safe is to move the bytes while the caller waits.
        submission.mode = KVF_SAVE_IN_PLACE;
        kvf_submit_options urgent = options;
        urgent.priority = KVF_PRIORITY_URGENT;
        engine_->submit(std::move(submission), std::move(recorded), urgent, job)
            ->wait(KVF_FOREVER, nullptr);
        return;
    }
    engine_->submit(std::move(submission), std::move(recorded), options, job);
}

// Copies aside what the submission would read. False where there is no room for it.
bool Llama::take_snapshot(Submission &submission, Recorded &recorded) {
    if (submission.gate) submission.gate->wait();
    try {
        for (auto &[device, layout] : recorded.layouts) {
            auto snapshot = engine_->device(device).snapshot(layout, submission.buffer);
            layout = std::move(snapshot.layout);
            if (snapshot.memory) submission.keep.push_back(std::move(snapshot.memory));
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
    const auto *state = static_cast<const unsigned char *>(buffer);

    // From here on whatever fails leaves the sequence empty.
    std::optional<Structure> structure;
    try {
        structure = check_state(state, bytes);
    } catch (...) {
        empty_sequence(sequence);
        throw;
    }
    // libllama empties the sequence itself, but only in those parts of the cache of which the state has
    // cells: a state without any would leave what was there.
    if (!structure || !structure->has_cells_everywhere()) empty_sequence(sequence);
    if (blocking_) {
        return load_blocking(sequence, std::move(submission), bytes, std::move(structure), options,
                             job);
    }

    Recorder recorder = make_recorder(Direction::Load, buffer, bytes, submission.gate);
    try {
        std::optional<OpenJob> open;
        uint32_t device = Engine::kHost;
        const auto landing = make_landing(options.mode, bytes, device);
        submission.mode = landing ? KVF_LOAD_AHEAD : KVF_LOAD_IN_PLACE;
        if (landing) {
            open.emplace(*engine_, std::move(submission), options, job != nullptr);
            open->approach(device, landing);
        } else {
            move_while_recording(recorder, open, submission, options, job != nullptr);
        }
        uint64_t read = 0;
        {
            Recording recording(recorder);
            read = api_.state_seq_set_data(context_, state, bytes, sequence, 0);
        }
        if (read != bytes) {
            open.reset(); // nothing may move any more when the sequence gives up its cells
            throw load_failure(sequence, recorder.abort_text(), structure);
        }
        Recorded recorded = recorder.finish();
        sequences_->note_tensors(recorder.tensors());
        if (structure) {
            check_recorded_whole(*structure, recorded);
            learn(*structure);
        }
        recorded.bytes = bytes;
        // What was not known before: the device has nothing of the cache.
        if (landing && !devices_.count(device)) open->job()->mode = KVF_LOAD_IN_PLACE;
        if (open) {
            open->commit(std::move(recorded), job);
        } else {
            engine_->submit(std::move(submission), std::move(recorded), options, job);
        }
    } catch (const Error &) {
        empty_sequence(sequence);
        throw;
    } catch (...) {
        empty_sequence(sequence);
        if (recorder.abort_text().empty()) throw;
        throw Error(KVF_ERR_STATE_DAMAGED, "libllama: " + recorder.abort_text());
    }
}

// Where a load ahead is brought, and to which device. NULL where it is done in place.
std::shared_ptr<Landing> Llama::make_landing(uint32_t mode, uint64_t bytes, uint32_t &device) {
    if (mode != KVF_LOAD_AHEAD) return nullptr;
    std::set<uint32_t> devices(devices_);
    devices.erase(Engine::kHost);
    // Nothing is known of a context in which no sequence had cells yet.
    if (devices_.empty() && engine_->device_count() == 2) devices.insert(1);
    if (devices.size() != 1) return nullptr;
    device = *devices.begin();
    return engine_->device(device).make_landing(bytes);
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
    engine_->wait([this](const Job &job) { return job.owned_by == this; });
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
    for (const uint32_t device : devices_) engine_->device(device).expect(direction);
    submission.direction = direction;
    submission.buffer = static_cast<unsigned char *>(const_cast<void *>(buffer));
    submission.buffer_bytes = bytes;
    submission.owned_by = this;
    const LlamaSequences::Transfer transfer{sequence, direction, blocking_ != nullptr};
    submission.on_entry = [sequences = sequences_, transfer] { sequences->begin(transfer); };
    submission.on_end = [sequences = sequences_, transfer](int32_t status) {
        sequences->end(transfer, status);
    };
    return submission;
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
        Locator locate(*engine_);
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
    if (must_hold_cells && api_.memory_seq_pos_max(api_.get_memory(context_), sequence) < 0) {
        throw Error(KVF_ERR_SEQUENCE_EMPTY, format("sequence %d", sequence));
    }
}

std::optional<Structure> Llama::check_state(const unsigned char *state, uint64_t bytes) {
    if (!has_state_magic(state, bytes)) {
        throw Error(KVF_ERR_STATE_DAMAGED, "it does not begin as the state of a sequence does");
    }
    auto structure = parse_state(state, bytes);
    if (!structure_) return structure; // a kind of cache that is not known: nothing to compare with
    if (!structure) throw Error(KVF_ERR_STATE_DAMAGED);
    const std::string why = mismatch(*structure, *structure_);
    if (!why.empty()) throw Error(KVF_ERR_STATE_MISMATCH, why);
    // The last position of a sequence has a cell in every part of the memory. libllama takes a state
    // without, and then has a sequence that is empty in one part and takes cells in another.
    if (structure->cells() > 0 && !structure->has_cells_everywhere()) {
        throw Error(KVF_ERR_STATE_DAMAGED, "it has cells for a part of the memory only");
    }
    return structure;
}

uint32_t Llama::resolve_mode(uint32_t mode) const {
    if (mode != KVF_SAVE_AUTO) return mode;
    return appends_only_ ? KVF_SAVE_IN_PLACE : KVF_SAVE_SNAPSHOT;
}

// ---- recording ---------------------------------------------------------------------------------

Recorder Llama::make_recorder(Direction direction, const void *buffer, uint64_t bytes,
                              std::shared_ptr<Gate> gate) {
    const auto locate = [this, direction, gate = std::move(gate), locator = Locator(*engine_),
                         last = int64_t{-1}](uint64_t address, uint64_t count) mutable -> int64_t {
        try {
            const uint32_t device = locator(address, count).device;
            if (device != last) engine_->device(device).expect(direction);
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

// Looks at the structure of a sequence's state. An empty sequence tells the kind of the cache, one with
// cells its types and row sizes too.
void Llama::learn_structure(int32_t sequence) {
    const uint64_t bytes = api_.state_seq_get_size(context_, sequence, 0);
    if (bytes == 0) return;
    ScratchState scratch(bytes);
    Recorder recorder = make_recorder(Direction::Save, scratch.data, bytes, nullptr);
    uint64_t written = 0;
    try {
        Recording recording(recorder);
        written = api_.state_seq_get_data(context_, scratch.data, bytes, sequence, 0);
    } catch (...) {
        return;
    }
    if (written == 0) return;
    recorder.finish(); // throws what went wrong
    sequences_->note_tensors(recorder.tensors());
    if (const auto structure = parse_state(scratch.data, written)) learn(*structure);
}

void Llama::learn(const Structure &structure) {
    if (!structure_) {
        structure_ = structure;
        const bool has_recurrent = structure.kind().find("recurrent") != std::string::npos;
        std::lock_guard lock(mutex_);
        cache_kind_ = structure.kind();
        // Attention alone only appends. A window is overwritten as it slides.
        appends_only_ = !has_recurrent && !api_.model_is_recurrent(model_) &&
                        !(api_.model_is_hybrid && api_.model_is_hybrid(model_)) &&
                        api_.model_n_swa(model_) == 0;
        return;
    }
    if (structure_->sections.size() != structure.sections.size()) return;
    for (size_t i = 0; i < structure.sections.size(); ++i) {
        if (structure_->sections[i].cells == 0) structure_->sections[i] = structure.sections[i];
    }
}

bool Llama::knows_cells() const { return structure_ && structure_->has_cells_everywhere(); }

// ---- failure -----------------------------------------------------------------------------------

void Llama::empty_sequence(int32_t sequence) {
    sequences_->forget(sequence);
    api_.memory_seq_rm(api_.get_memory(context_), sequence, -1, -1);
}

// libllama returned an error for a state that looks whole. It says why in its log only; this finds out
// as much as the program's next step depends on.
Error Llama::load_failure(int32_t sequence, const std::string &abort_text,
                          const std::optional<Structure> &state) {
    empty_sequence(sequence); // it may hold a part of the state
    if (!abort_text.empty()) return Error(KVF_ERR_STATE_DAMAGED, "libllama: " + abort_text);
    if (!state) return Error(KVF_ERR_STATE_DAMAGED, "libllama refused it");
    bool others = false;
    for (uint32_t i = 0; i < sequence_count_; ++i) {
        const auto other = static_cast<int32_t>(i);
        if (api_.memory_seq_pos_max(api_.get_memory(context_), other) < 0) continue;
        others = true;
        if (!knows_cells()) learn_structure(other);
    }
    if (structure_) {
        const std::string why = mismatch(*state, *structure_);
        if (!why.empty()) return Error(KVF_ERR_STATE_MISMATCH, why);
    }
    const uint32_t cells = api_.n_ctx_seq ? api_.n_ctx_seq(context_) : api_.n_ctx(context_);
    if (state->cells() > cells || others || knows_cells()) {
        return Error(KVF_ERR_CACHE_FULL,
                     format("the state has %llu cells; a sequence may have %u",
                            static_cast<unsigned long long>(state->cells()), cells));
    }
    return Error(KVF_ERR_STATE_MISMATCH, "libllama refused it");
}

// Called by libllama's thread that frees the context, before the memory goes.
void Llama::on_buffer_freed(uint64_t begin, uint64_t bytes) {
    if (!sequences_->note_buffer_freed(begin, bytes)) return;
    const auto ours = [this](const Job &job) { return job.owned_by == this; };
    engine_->cancel(ours);
    engine_->wait(ours);
}

// ---- without the tap: libllama's blocking calls, on a thread of ours ---------------------------

void Llama::save_blocking(int32_t sequence, Submission &&submission,
                          const kvf_submit_options &options, kvf_job *job) {
    const uint64_t needed = api_.state_seq_get_size(context_, sequence, 0);
    if (submission.buffer_bytes < needed) {
        throw Error(KVF_ERR_BUFFER_TOO_SMALL,
                    format("%llu bytes are needed, %llu were given",
                           static_cast<unsigned long long>(needed),
                           static_cast<unsigned long long>(submission.buffer_bytes)));
    }
    submission.buffer_bytes = needed;
    submission.mode = KVF_SAVE_IN_PLACE; // the context must rest anyway
    run_blocking(
        std::move(submission), needed, options, job, [this, sequence, needed](Job &started) {
            const size_t n = api_.state_seq_get_data(context_, started.buffer, needed, sequence, 0);
            if (n != needed) started.fail(KVF_ERR_LLAMA, "llama_state_seq_get_data failed");
        });
}

void Llama::load_blocking(int32_t sequence, Submission &&submission, uint64_t bytes,
                          std::optional<Structure> &&structure, const kvf_submit_options &options,
                          kvf_job *job) {
    const auto load = [this, sequence, bytes, structure = std::move(structure)](Job &started) {
        const size_t n = api_.state_seq_set_data(context_, started.buffer, bytes, sequence, 0);
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
    job->expect_leg(); // of a kind: the thread's
    try {
        blocking_->add([job, work = std::move(work)] {
            job->wait_for_turn();
            if (!job->stopping()) {
                job->note_started(now_ns());
                work(*job);
            }
            job->let_go();
        });
    } catch (...) {
        job->let_go();
        throw;
    }
    Recorded recorded;
    recorded.bytes = bytes;
    open.commit(std::move(recorded), handle);
}

} // namespace kvf
