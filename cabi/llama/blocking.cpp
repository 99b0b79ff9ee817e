// Without the tap: saves and loads by libllama's own blocking calls, on one of the library's
// threads. The context rests meanwhile.
#include "llama/llama.h"
#include "memory/buffer_checks.h"
#include "states/envelope.h"

namespace kvf {

void Llama::save_blocking(int32_t sequence, Submission &&submission,
                          const kvf_submit_options &options, kvf_job *job) {
    const uint64_t state_bytes = context_.state_bytes(sequence);
    const uint64_t needed = state_bytes + (states_->policy().seals_states() ? Envelope::kBytes : 0);
    check_room(needed, submission.buffer_bytes);
    submission.buffer_bytes = needed;
    submission.mode = KVF_SAVE_IN_PLACE; // the context must rest anyway
    run_blocking(
        std::move(submission), needed, options, job, [this, sequence, state_bytes](Job &started) {
            const size_t n = context_.api().state_seq_get_data(
                context_.pointer(), started.request.buffer, state_bytes, sequence, 0);
            if (n != state_bytes) {
                started.fail(KVF_ERR_LLAMA, "llama_state_seq_get_data_ext failed");
            } else if (states_->policy().seals_states()) {
                Envelope::seal(started.request.buffer, state_bytes, context_.fingerprint_number());
            }
        });
}

void Llama::load_blocking(int32_t sequence, IncomingState &&state, Submission &&submission,
                          const kvf_submit_options &options, kvf_job *job) {
    const uint64_t bytes = state.view.bytes;
    auto load = [this, sequence, bytes, structure = std::move(state.structure)](Job &started) {
        const size_t n = context_.api().state_seq_set_data(
            context_.pointer(), started.request.buffer, bytes, sequence, 0);
        if (n == bytes) return;
        try {
            // The context rests, so what belongs to its thread may be looked at here.
            throw load_failure(sequence, "", structure ? &*structure : nullptr);
        } catch (const Error &failure) {
            started.fail(failure.status, failure.detail);
        }
    };
    submission.mode = KVF_LOAD_IN_PLACE;
    run_blocking(std::move(submission), bytes, options, job, std::move(load));
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
