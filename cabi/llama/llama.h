// An attachment to a llama_context: sizes, saves and loads of its sequences.
#pragma once

#include <set>

#include "core/thread_pool.h"
#include "engine/open_job.h"
#include "llama/formats.h"
#include "llama/recorder.h"
#include "llama/sequences.h"
#include "llama/tap.h"

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
    // A state that is to be loaded, looked at.
    struct Incoming {
        StateView view;                     // without its envelope, if it has one
        std::optional<Structure> structure; // nothing where the cache is opaque
    };

    bool may_be_written_by_stream(const void *buffer, uint64_t bytes) const;
    void check_usable();
    void check_devices();
    void check_sequence(int32_t sequence, bool must_hold_cells);
    bool holds_cells(int32_t sequence) const;

    Incoming examine(int32_t sequence, const unsigned char *state, uint64_t bytes, uint32_t flags);
    Incoming examine_opaque(const unsigned char *state, uint64_t bytes, uint32_t flags) const;
    Structure examine_first(int32_t sequence, const StateView &view);
    Structure examine_known(const StateView &view) const;
    void check_positions(const Structure &structure, const StateView &view) const;
    bool lacks_cells(const Structure &structure) const;
    bool takes_format_of(int32_t sequence, const Structure &candidate);
    bool writes_as(int32_t sequence, const Structure &candidate);

    uint32_t resolve_mode(uint32_t mode) const;
    bool take_snapshot(Submission &submission, Recorded &recorded);
    void save_opaque(int32_t sequence, Submission &&submission, const kvf_submit_options &options,
                     kvf_job *job);
    void load_recorded(int32_t sequence, const Incoming &state, Submission &&submission,
                       const kvf_submit_options &options, kvf_job *job);
    void load_opaque(int32_t sequence, const Incoming &state, Submission &&submission,
                     const kvf_submit_options &options, kvf_job *job);
    std::shared_ptr<LoadAhead> make_load_ahead(uint32_t mode, uint64_t bytes, uint32_t &device);
    bool guard_window(const Structure &structure, const StateView &view, Recorder &recorder,
                      const Gate *gate) const;
    Enclosure enclosure(Direction direction, int32_t sequence, const Recorder &recorder,
                        bool close) const;
    std::function<bool()> watch(Direction direction, int32_t sequence) const;
    void move_now(Direction direction, unsigned char *buffer, uint64_t bytes, Layouts &&layouts,
                  Gate *gate);
    void complete(Submission &&submission, Recorded &&recorded, const kvf_submit_options &options,
                  kvf_job *job);
    void empty_sequence(int32_t sequence);

    uint64_t write_state(int32_t sequence, unsigned char *buffer, uint64_t bytes,
                         Recorder &recorder);
    bool read_state(int32_t sequence, const StateView &view, Recorder &recorder);
    Recorder make_recorder(Direction direction, const void *buffer, uint64_t bytes,
                           std::shared_ptr<Gate> gate);
    void move_while_recording(Recorder &recorder, std::optional<OpenJob> &open,
                              Submission &submission, const kvf_submit_options &options,
                              bool with_handle);
    static void check_heard_anything(const Recorder &recorder);
    static void check_recorded_whole(const Structure &structure, const Recorded &recorded);
    int32_t most_telling_sequence() const;
    struct Metadata;
    std::optional<Metadata> record_metadata(int32_t sequence);
    void learn_structure(int32_t sequence);
    void learn_structure_of_any();
    void learn(const Structure &structure);
    void learn_that_opaque();
    uint64_t fingerprint_number() const { return std::stoull(fingerprint_, nullptr, 16); }
    bool is_opaque() const { return states_ == States::Opaque; }
    Error load_failure(int32_t sequence, const std::string &abort_text,
                       const std::optional<Structure> &state);
    std::string what_is_left(int32_t sequence) const;
    std::string describe_cells(const Structure &state) const;
    uint32_t most_cells() const;
    void save_blocking(int32_t sequence, Submission &&submission, const kvf_submit_options &options,
                       kvf_job *job);
    void load_blocking(int32_t sequence, Incoming &&state, Submission &&submission,
                       const kvf_submit_options &options, kvf_job *job);
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
    std::unique_ptr<Tap> tap_;             // either this
    std::unique_ptr<ThreadPool> blocking_; // or this

    // Touched by the context's thread only.
    BlockCache blocks_;
    std::set<uint32_t> devices_;  // that hold its tensors, as far as has been seen
    const int32_t window_;        // of sliding-window layers in tokens, or 0
    const int32_t last_position_; // states with positions beyond it are damaged

    // What has been seen of this cache's states: of none with cells yet, of one that a known format describes, or of
    // one that none does. Decided by what libllama itself writes or takes, once.
    enum class States { Unseen, Known, Opaque };
    std::atomic<States> states_{States::Unseen};
    std::optional<Structure> structure_; // unless opaque; without cells while unseen
    bool positions_agree_ = true;        // in the states that this libllama has written
    uint64_t empty_bytes_ = 0;           // of the state of an empty sequence; 0: not seen

    // Looked at by describe(), on any thread; so is whether there is a tap.
    mutable std::mutex mutex_;
    std::string cache_kind_ = "unknown";
    std::string format_name_ = "unseen";
    bool appends_only_ = false; // decoding never overwrites what a save in flight reads
    bool replaced_ = false;     // the context's address holds something else by now
    bool detached_ = false;
};

} // namespace kvf
