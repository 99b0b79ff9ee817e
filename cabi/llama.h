// An attachment to a llama_context: sizes, saves and loads of its sequences.
#pragma once

#include <set>

#include "crew.h"
#include "engine.h"
#include "llama_sequences.h"
#include "structure.h"
#include "tap.h"

namespace kvf {

class Llama final : public Object {
public:
    static constexpr ObjectType kType = ObjectType::Llama;

    Llama(std::shared_ptr<Engine> engine, llama_context *context, const kvf_llama_options &options);
    ~Llama() override;

    std::string describe() const;
    uint64_t size(int32_t sequence);
    void save(int32_t sequence, void *buffer, uint64_t bytes, const kvf_submit_options &options,
              kvf_job *job);
    void load(int32_t sequence, const void *buffer, uint64_t bytes,
              const kvf_submit_options &options, kvf_job *job);
    void remove(int32_t sequence);
    uint32_t settle();
    void detach();

private:
    void check_usable();
    void check_devices();
    void check_sequence(int32_t sequence, bool must_hold_cells);
    std::optional<Structure> check_state(const unsigned char *state, uint64_t bytes);
    uint32_t resolve_mode(uint32_t mode) const;
    bool take_snapshot(Submission &submission, Recorded &recorded);
    std::shared_ptr<Landing> make_landing(uint32_t mode, uint64_t bytes, uint32_t &device);
    void empty_sequence(int32_t sequence);
    Recorder make_recorder(Direction direction, const void *buffer, uint64_t bytes,
                           std::shared_ptr<Gate> gate);
    void move_while_recording(Recorder &recorder, std::optional<OpenJob> &open,
                              Submission &submission, const kvf_submit_options &options,
                              bool with_handle);
    static void check_heard_anything(const Recorder &recorder);
    static void check_recorded_whole(const Structure &structure, const Recorded &recorded);
    int32_t most_telling_sequence() const;
    void learn_structure(int32_t sequence);
    void learn(const Structure &structure);
    bool knows_cells() const;
    Error load_failure(int32_t sequence, const std::string &abort_text,
                       const std::optional<Structure> &state);
    void save_blocking(int32_t sequence, Submission &&submission, const kvf_submit_options &options,
                       kvf_job *job);
    void load_blocking(int32_t sequence, Submission &&submission, uint64_t bytes,
                       std::optional<Structure> &&structure, const kvf_submit_options &options,
                       kvf_job *job);
    void run_blocking(Submission &&submission, uint64_t bytes, const kvf_submit_options &options,
                      kvf_job *handle, std::function<void(Job &)> work);
    Submission begin(Direction direction, int32_t sequence, const void *buffer, uint64_t bytes,
                     const kvf_submit_options &options);
    void on_buffer_freed(uint64_t begin, uint64_t bytes);
    void let_go();

    const std::shared_ptr<Engine> engine_;
    llama_context *const context_;
    const LlamaApi api_;
    const llama_model *const model_;
    const uint32_t sequence_count_; // 0 to one less
    const std::shared_ptr<LlamaSequences> sequences_;
    const std::string model_text_; // kept, for describe() may be called when the model is gone
    const std::string fingerprint_;
    std::unique_ptr<Tap> tap_;       // either this
    std::unique_ptr<Crew> blocking_; // or this

    // Touched by the context's thread only.
    BlockCache blocks_;
    std::set<uint32_t> devices_;         // that hold its tensors, as far as has been seen
    std::optional<Structure> structure_; // of this cache's states, as far as it has been seen

    // Looked at by describe(), on any thread; so is whether there is a tap.
    mutable std::mutex mutex_;
    std::string cache_kind_ = "unknown";
    bool appends_only_ = false; // decoding never overwrites what a save in flight reads
    bool replaced_ = false;     // the context's address holds something else by now
    bool detached_ = false;
};

} // namespace kvf
