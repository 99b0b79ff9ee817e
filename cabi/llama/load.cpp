// The way of a load: kvf_llama_load() -> Llama::load() -> the state is checked -> libllama takes
// cells, the recorder notes where their tensor bytes belong -> a job of the engine moves these.
#include "llama/llama.h"
#include "states/envelope.h"

namespace kvf {

void Llama::load(int32_t sequence, const void *buffer, uint64_t bytes,
                 const kvf_submit_options &options, kvf_job *job) {
    Submission submission = make_submission(Direction::Load, sequence, options);
    set_buffer(submission, buffer, bytes);
    check_sequence(sequence, Holds::Nothing);
    sequences_->check_idle(sequence, LlamaSequences::Busy::WithAny);
    const auto *const given = static_cast<const unsigned char *>(buffer);
    if (states_->is_unseen()) states_->look_at_any();
    // What the stream still writes must not be read before.
    if (submission.gate && may_be_written_by_stream(buffer, bytes)) submission.gate->wait();
    // An envelope is verified here, which reads the whole state.
    const bool sealed = states_->policy().seals_states() || Envelope::is_on(given, bytes);
    if (sealed && submission.gate) submission.gate->wait();
    IncomingState state = states_->examine(sequence, given, bytes, options.flags);

    // From here on a failure leaves the sequence empty. libllama empties the sequence itself, but
    // only in those parts of the cache for which the state has cells. A state without cells would
    // leave the former content.
    if (!state.structure || !state.structure->has_cells_everywhere()) {
        states_->empty_sequence(sequence);
        states_->note_empty(sequence);
    }
    submission.buffer_bytes = state.view.bytes;
    if (blocking_) {
        return load_blocking(sequence, std::move(state), std::move(submission), options, job);
    }
    try {
        if (state.structure) {
            load_recorded(sequence, state.view, *state.structure, std::move(submission), options,
                          job);
        } else {
            load_during_call(sequence, state, std::move(submission), options, job);
        }
    } catch (...) {
        states_->empty_sequence(sequence);
        throw;
    }
}

void Llama::load_recorded(int32_t sequence, const StateView &view, const Structure &structure,
                          Submission &&submission, const kvf_submit_options &options,
                          kvf_job *job) {
    unsigned char *const buffer = submission.buffer;
    const auto fence = submission.fence;
    const auto gate = submission.gate;
    Recorder recorder = make_recorder(Direction::Load, view.data, view.bytes, gate);
    const bool stops_rows = guard_window(structure, view, recorder, gate.get());
    std::optional<OpenJob> open;
    uint32_t device = Device::kHost;
    const auto load_ahead = make_load_ahead(options.mode, {{0, view.bytes}}, device);
    submission.mode = load_ahead ? KVF_LOAD_AHEAD : KVF_LOAD_IN_PLACE;
    if (load_ahead) {
        open.emplace(*engine_, std::move(submission), options, job != nullptr);
        open->stage(device, load_ahead);
    } else {
        start_job_from_recorder(recorder, open, submission, options, job != nullptr);
    }
    Recorded recorded = take_cells(sequence, view, structure, recorder, open);
    recorded.bytes = view.bytes;
    fence->raise(enclosure(Direction::Load, sequence, recorder, stops_rows));
    move_now(Direction::Load, buffer, view.bytes, recorder.take_early(), nullptr);
    // Only now is it known that this device holds none of the cache.
    if (load_ahead && !devices_.contains(device)) recorded.mode = KVF_LOAD_IN_PLACE;
    commit(open, submission, std::move(recorded), options, job);
}

// Has libllama take the state's cells, whose tensor bytes the recorder notes. Where libllama
// refuses, the open job is withdrawn: no byte may move when the sequence loses its cells.
Recorded Llama::take_cells(int32_t sequence, const StateView &view, const Structure &structure,
                           Recorder &recorder, std::optional<OpenJob> &open) {
    if (!context_.read_state(sequence, view, recorder)) {
        open.reset();
        throw load_failure(sequence, recorder.abort_text(), &structure);
    }
    Recorded recorded = recorder.finish();
    if (context_.holds_cells(sequence)) check_recorded_anything(recorder);
    sequences_->note_tensors(recorder.tensors());
    check_recorded_whole(structure, recorded);
    states_->note_believed(structure);
    return recorded;
}

// The call moves all bytes; the job has nothing left to move.
void Llama::load_during_call(int32_t sequence, const IncomingState &state, Submission &&submission,
                             const kvf_submit_options &options, kvf_job *job) {
    const StateView &view = state.view;
    Recorder recorder = make_recorder(Direction::Load, view.data, view.bytes, submission.gate);
    if (!context_.read_state(sequence, view, recorder)) {
        throw load_failure(sequence, recorder.abort_text(), nullptr);
    }
    Recorded recorded = recorder.finish();
    if (context_.holds_cells(sequence)) check_recorded_anything(recorder);
    sequences_->note_tensors(recorder.tensors());
    move_now(Direction::Load, submission.buffer, view.bytes, std::exchange(recorded.layouts, {}),
             submission.gate.get());
    recorded.bytes = view.bytes;
    submission.mode = KVF_LOAD_IN_PLACE;
    submit_job(*engine_, std::move(submission), std::move(recorded), options, job);
}

// Returns device memory to load parts of the buffer ahead, and on which device it is. NULL where
// the load is done in place.
std::shared_ptr<LoadAhead>
Llama::make_load_ahead(uint32_t mode, const std::vector<BufferPart> &parts, uint32_t &device) {
    if (mode != KVF_LOAD_AHEAD) return nullptr;
    std::set<uint32_t> devices(devices_);
    devices.erase(Device::kHost);
    // Nothing is known of a context in which no sequence had cells yet.
    if (devices_.empty() && engine_->device_count() == 2) devices.insert(1);
    if (devices.size() != 1) return nullptr;
    device = *devices.begin();
    return engine_->device(device).make_load_ahead(parts);
}

// If libllama moved bytes without the tap, they are not in the record.
void Llama::check_recorded_whole(const Structure &structure, const Recorded &recorded) {
    if (structure.tensor_bytes != recorded.bytes) {
        throw Error(KVF_ERR_TAP, "libllama moved tensor bytes in a way that was not recorded");
    }
}

// The error of a load that libllama refused although the state looks whole. libllama gives its
// reason only in its log. Empties the sequence.
Error Llama::load_failure(int32_t sequence, const std::string &abort_text, const Structure *state) {
    states_->empty_sequence(sequence); // it may hold a part of the state
    const std::string left = states_->what_is_left(sequence);
    if (!abort_text.empty()) return Error(KVF_ERR_LLAMA, abort_text + left);
    if (!state) return Error(KVF_ERR_LLAMA, "it did not take the state" + left);
    return Error(KVF_ERR_CACHE_FULL, states_->describe_cells(*state) + left);
}

} // namespace kvf
