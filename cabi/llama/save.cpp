// The way of a save: kvf_llama_save() -> Llama::save() -> libllama writes the state, the recorder
// notes where its tensor bytes are -> a job of the engine moves these. transfer.cpp has what a save
// shares with a load: it makes the submission, the recorder and the job.
#include "llama/llama.h"
#include "memory/buffer_checks.h"
#include "states/envelope.h"

namespace kvf {

void Llama::save(int32_t sequence, void *buffer, uint64_t bytes, const kvf_submit_options &options,
                 kvf_job *job) {
    Submission submission = make_submission(Direction::Save, sequence, options);
    set_buffer(submission, buffer, bytes);
    check_sequence(sequence, Holds::State);
    sequences_->check_idle(sequence, LlamaSequences::Busy::WithLoads);
    if (states_->is_unseen()) states_->look_at(sequence);
    const CachePolicy policy = states_->policy();
    submission.mode = policy.save_mode(options.mode);
    if (blocking_) return save_blocking(sequence, std::move(submission), options, job);
    if (policy.moves_during_call())
        return save_during_call(sequence, std::move(submission), options, job);
    if (submission.mode == KVF_SAVE_IN_PLACE)
        return save_in_place(sequence, std::move(submission), options, job);
    save_snapshot(sequence, std::move(submission), options, job);
}

// Has libllama write the state into the buffer, but for its tensor bytes.
Recorded Llama::record_save(int32_t sequence, unsigned char *buffer, uint64_t bytes,
                            Recorder &recorder, LlamaContext::Extent extent) {
    const uint64_t written = context_.write_state(sequence, buffer, bytes, recorder, extent);
    Recorded recorded = recorder.finish();
    check_recorded_anything(recorder);
    sequences_->note_tensors(recorder.tensors());
    recorded.bytes = written;
    return recorded;
}

// The job moves the bytes straight from the cache, and begins while libllama still names them.
void Llama::save_in_place(int32_t sequence, Submission &&submission,
                          const kvf_submit_options &options, kvf_job *job) {
    unsigned char *const buffer = submission.buffer;
    const uint64_t bytes = submission.buffer_bytes;
    const auto fence = submission.fence;
    Recorder recorder = make_recorder(Direction::Save, buffer, bytes, submission.gate);
    bool stops_rows = false;
    if (states_->policy().gives_cells_away()) {
        // Only positions tell which cells others may take, and libllama writes these while it
        // lists.
        const auto metadata = states_->record_metadata(sequence);
        const auto structure =
            metadata ? parse_state(metadata->view(), states_->structure()) : std::nullopt;
        // What cannot be guarded is copied aside.
        if (!structure) return save_snapshot(sequence, std::move(submission), options, job);
        stops_rows = guard_window(*structure, metadata->view(), recorder, submission.gate.get());
    }
    std::optional<OpenJob> open;
    // From here on the recorder opens the job: Recorder::begin_tensor() calls the sink.
    start_job_from_recorder(recorder, open, submission, options, job != nullptr);
    Recorded recorded = record_save(sequence, buffer, bytes, recorder);
    fence->raise(enclosure(Direction::Save, sequence, recorder, stops_rows));
    move_now(Direction::Save, buffer, recorded.bytes, recorder.take_early(), nullptr);
    if (!open) submission.buffer_bytes = recorded.bytes;
    commit(open, submission, std::move(recorded), options, job);
}

// The call copies the bytes aside, on their devices; the job moves them from there.
void Llama::save_snapshot(int32_t sequence, Submission &&submission,
                          const kvf_submit_options &options, kvf_job *job) {
    Recorder recorder =
        make_recorder(Direction::Save, submission.buffer, submission.buffer_bytes, submission.gate);
    Recorded recorded = record_save(sequence, submission.buffer, submission.buffer_bytes, recorder);
    submission.buffer_bytes = recorded.bytes;
    submit_snapshot(std::move(submission), std::move(recorded), options, job);
}

// Copies aside what was recorded, and lets the job move the copy.
void Llama::submit_snapshot(Submission &&submission, Recorded &&recorded,
                            const kvf_submit_options &options, kvf_job *job) {
    submission.mode = KVF_SAVE_SNAPSHOT;
    if (take_snapshot(submission, recorded)) {
        submit_job(*engine_, std::move(submission), std::move(recorded), options, job);
        return;
    }
    // Device memory is short. What remains safe is to move the bytes while the caller waits.
    submission.mode = KVF_SAVE_IN_PLACE;
    kvf_submit_options urgent = options;
    urgent.priority = KVF_PRIORITY_URGENT;
    submit_job(*engine_, std::move(submission), std::move(recorded), urgent, job)
        ->wait(KVF_FOREVER, nullptr);
}

// Copies aside what the submission would read. False where there is no room for it.
bool Llama::take_snapshot(Submission &submission, Recorded &recorded) {
    if (submission.gate) submission.gate->wait();
    try {
        for (auto &[device, layout] : recorded.layouts) {
            auto snapshot = engine_->device(device).snapshot(layout, submission.buffer);
            snapshot.layout.block = layout.block;
            layout = std::move(snapshot.layout);
            if (snapshot.memory) submission.keep_alive.push_back(std::move(snapshot.memory));
        }
        return true;
    } catch (const Error &error) {
        if (error.status != KVF_ERR_OUT_OF_MEMORY) throw;
        return false;
    }
}

// The call moves all bytes, since the envelope needs them; the job has nothing left to move.
void Llama::save_during_call(int32_t sequence, Submission &&submission,
                             const kvf_submit_options &options, kvf_job *job) {
    const uint64_t needed = context_.state_bytes(sequence);
    check_room(needed + Envelope::kBytes, submission.buffer_bytes);
    unsigned char *const state = submission.buffer;
    Recorder recorder = make_recorder(Direction::Save, state, needed, submission.gate);
    Recorded recorded = record_save(sequence, state, needed, recorder);
    const uint64_t written = recorded.bytes;
    move_now(Direction::Save, state, written, std::exchange(recorded.layouts, {}),
             submission.gate.get());
    Envelope::seal(state, written, context_.fingerprint_number());
    recorded.bytes = written + Envelope::kBytes;
    submission.mode = KVF_SAVE_SNAPSHOT;
    submit_job(*engine_, std::move(submission), std::move(recorded), options, job);
}

} // namespace kvf
