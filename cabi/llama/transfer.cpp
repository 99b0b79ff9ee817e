// What saves and loads have in common.
#include "llama/llama.h"
#include "memory/buffer_checks.h"
#include "states/cells.h"

namespace kvf {
namespace {

// The least part that is moved while libllama still names others, in bytes. Less is recorded sooner
// than a job begins.
constexpr uint64_t kLeastPart = 4 << 20;

} // namespace

Submission Llama::make_submission(Direction direction, int32_t sequence,
                                  const kvf_submit_options &options) {
    Submission submission;
    submission.submitted_ns = now_ns();
    settle();
    check_usable();
    engine_->check(options); // invalid options must not cost a sequence its cells
    if (tap_) tap_->renew_slots();
    Fence::wait_for_disturbed(context_.pointer());
    check_devices();
    DeviceSet moved = 0;
    for (const uint32_t device : devices_) moved |= device_set(device);
    submission.gate = engine_->make_gate(options, moved);
    for (const uint32_t device : devices_) engine_->device(device).announce(direction);
    submission.direction = direction;
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

void Llama::set_buffer(Submission &submission, const void *buffer, uint64_t bytes) {
    if (!buffer || bytes == 0) throw Error(KVF_ERR_INVALID_ARGUMENT, "buffer is NULL or empty");
    check_accessible(submission.direction, buffer, bytes);
    submission.buffer = static_cast<unsigned char *>(const_cast<void *>(buffer));
    submission.buffer_bytes = bytes;
}

// A copy engine or a kernel that a stream has been given writes to pinned memory alone.
bool Llama::may_be_written_by_stream(const void *buffer, uint64_t bytes) const {
    const auto pinner = engine_->pinner();
    return pinner && pinner->is_pinned(buffer, bytes);
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
            if (gate) gate->wait(); // libllama copies this tensor during the call
            return -1;
        }
    };
    return Recorder(direction, buffer, bytes, static_cast<uint32_t>(engine_->device_count()),
                    locate, heap_, tap_ ? &tap_->recorded_calls() : nullptr);
}

// Has the recorder start the job when libllama has named the first part, and move that part while
// libllama names the others. If the call fails later, the job ends without a completion.
// Submission, options and recorder must outlive the recording.
void Llama::start_job_from_recorder(Recorder &recorder, std::optional<OpenJob> &open,
                                    Submission &submission, const kvf_submit_options &options,
                                    bool with_handle) {
    const auto sink = [this, &open, &submission, &options, with_handle](uint32_t device,
                                                                        Layout &&part) {
        if (!open) open.emplace(*engine_, std::move(submission), options, with_handle);
        open->add(device, std::move(part));
    };
    recorder.set_sink(sink, kLeastPart);
}

// Commits the job. Starts it from the submission if no part of it has been moved early.
void Llama::commit(std::optional<OpenJob> &open, Submission &submission, Recorded &&recorded,
                   const kvf_submit_options &options, kvf_job *job) {
    if (open) {
        open->commit(std::move(recorded), job);
    } else {
        submit_job(*engine_, std::move(submission), std::move(recorded), options, job);
    }
}

// Protects the cells that libllama may give to other sequences during the transfer: their bytes are
// moved before the call returns. If the transfer follows a stream, they cannot: then this returns
// true, and the fence must stop rows, so that decoding waits.
bool Llama::guard_window(const Structure &structure, const StateView &view, Recorder &recorder,
                         const Gate *gate) const {
    auto ranges = bytes_free_for_others(structure, view, context_.window());
    if (gate) return !ranges.empty();
    recorder.set_early(std::move(ranges));
    return false;
}

// What must stay as it is until the recorded transfer has ended.
Enclosure Llama::enclosure(Direction direction, int32_t sequence, const Recorder &recorder,
                           bool stops_rows) const {
    Enclosure enclosure;
    enclosure.memory = recorder.memory();
    enclosure.stops_rows = stops_rows;
    enclosure.context = context_.pointer();
    enclosure.is_disturbed = watch(direction, sequence);
    if (!states_->policy().tells_rows()) return enclosure;
    // A state without cells, in a context that has never had one, tells of no tensor.
    const auto &tensors = states_->structure()->sections[0].tensors;
    if (tensors.empty()) return enclosure;
    enclosure.rows = recorder.first_tensor();
    enclosure.row_bytes = tensors[0].row;
    return enclosure;
}

// Returns a function that says whether the sequence has been changed since, as far as its first and
// last position tell. Where libllama tells none (a part of the sequence is empty), it says so from
// the beginning.
std::function<bool()> Llama::watch(Direction direction, int32_t sequence) const {
    const CachePolicy policy = states_->policy();
    const bool keeps_first = policy.keeps_first_position();
    const bool may_append = direction == Direction::Save && policy.appends_only();
    const auto is_disturbed = [=, this, first = context_.first_position(sequence),
                               last = context_.last_position(sequence)] {
        const int32_t now = context_.last_position(sequence);
        if (last < 0) return true;
        if (may_append ? now < last : now != last) return true;
        return keeps_first && context_.first_position(sequence) != first;
    };
    return is_disturbed;
}

// Moves bytes that must not be moved later, while the caller waits. Throws the error of a job that
// failed.
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

// A sequence with cells has tensor bytes. If none were recorded, libllama's calls bypass the tap,
// and libllama has moved everything itself during the call.
void Llama::check_recorded_anything(const Recorder &recorder) {
    if (!recorder.tensors().empty()) return;
    throw Error(KVF_ERR_TAP,
                "the tap recorded nothing: somebody else has put functions into libllama's slots");
}

} // namespace kvf
