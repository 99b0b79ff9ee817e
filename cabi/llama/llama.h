// An attachment to a llama_context: sizes, saves and loads of its sequences. The class is in
// several files, which the comments below name.
#pragma once

#include <functional>
#include <set>
#include <span>

#include "core/thread_pool.h"
#include "engine/open_job.h"
#include "llama/known_states.h"
#include "llama/sequences.h"
#include "llama/tap.h"
#include "states/blocks.h"

namespace kvf {

struct BufferOfParts; // blocks.cpp

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
    kvf_blocks_allowed blocks_allowed(std::string &why);
    uint64_t block_size(uint32_t tokens);
    // Calls `sizes_known` when the `bytes` of each block are written: before the job is submitted,
    // and also if a block is too small.
    void save_blocks(int32_t sequence, std::span<kvf_block> blocks,
                     const std::function<void()> &sizes_known, const kvf_submit_options &options,
                     kvf_job *job);
    void load_blocks(int32_t sequence, std::span<const kvf_block> blocks, const void *checkpoint,
                     uint64_t checkpoint_bytes, const kvf_submit_options &options, kvf_job *job);
    uint64_t checkpoint_size(int32_t sequence);
    void save_checkpoint(int32_t sequence, void *buffer, uint64_t bytes,
                         const kvf_submit_options &options, kvf_job *job);
    void remove(int32_t sequence);
    uint32_t settle();
    void detach();

private:
    // llama.cpp: the attachment.
    std::unique_ptr<Tap> open_tap(uint32_t flags);
    void check_usable();
    void check_devices();
    // What a sequence holds at least: nothing, cells in a part of the cache, or a state that can
    // be loaded again.
    enum class Holds { Nothing, Cells, State };
    void check_sequence(int32_t sequence, Holds least);
    void on_buffer_freed(uint64_t begin, uint64_t bytes);
    void release();

    // transfer.cpp: what saves and loads have in common.
    Submission make_submission(Direction direction, int32_t sequence,
                               const kvf_submit_options &options);
    static void set_buffer(Submission &submission, const void *buffer, uint64_t bytes);
    bool may_be_written_by_stream(const void *buffer, uint64_t bytes) const;
    Recorder make_recorder(Direction direction, const void *buffer, uint64_t bytes,
                           std::shared_ptr<Gate> gate);
    void start_job_from_recorder(Recorder &recorder, std::optional<OpenJob> &open,
                                 Submission &submission, const kvf_submit_options &options,
                                 bool with_handle);
    void commit(std::optional<OpenJob> &open, Submission &submission, Recorded &&recorded,
                const kvf_submit_options &options, kvf_job *job);
    bool guard_window(const Structure &structure, const StateView &view, Recorder &recorder,
                      const Gate *gate) const;
    Enclosure enclosure(Direction direction, int32_t sequence, const Recorder &recorder,
                        bool stops_rows) const;
    std::function<bool()> watch(Direction direction, int32_t sequence) const;
    std::function<bool()> watch_blocks(int32_t sequence, int32_t end) const;
    void move_now(Direction direction, unsigned char *buffer, uint64_t bytes, Layouts &&layouts,
                  Gate *gate);
    static void check_recorded_anything(const Recorder &recorder);

    // save.cpp
    Recorded record_save(int32_t sequence, unsigned char *buffer, uint64_t bytes,
                         Recorder &recorder,
                         LlamaContext::Extent extent = LlamaContext::Extent::Whole);
    void save_in_place(int32_t sequence, Submission &&submission, const kvf_submit_options &options,
                       kvf_job *job);
    void save_snapshot(int32_t sequence, Submission &&submission, const kvf_submit_options &options,
                       kvf_job *job);
    void submit_snapshot(Submission &&submission, Recorded &&recorded,
                         const kvf_submit_options &options, kvf_job *job);
    bool take_snapshot(Submission &submission, Recorded &recorded);
    void save_during_call(int32_t sequence, Submission &&submission,
                          const kvf_submit_options &options, kvf_job *job);

    // load.cpp
    void load_recorded(int32_t sequence, const StateView &view, const Structure &structure,
                       Submission &&submission, const kvf_submit_options &options, kvf_job *job);
    Recorded take_cells(int32_t sequence, const StateView &view, const Structure &structure,
                        Recorder &recorder, std::optional<OpenJob> &open);
    void load_during_call(int32_t sequence, const IncomingState &state, Submission &&submission,
                          const kvf_submit_options &options, kvf_job *job);
    std::shared_ptr<LoadAhead> make_load_ahead(uint32_t mode, const std::vector<BufferPart> &parts,
                                               uint32_t &device);
    static void check_recorded_whole(const Structure &structure, const Recorded &recorded);
    Error load_failure(int32_t sequence, const std::string &abort_text, const Structure *state);

    // blocks.cpp
    class BorrowedSequence;
    int32_t find_empty_sequence() const;
    bool positions_tell_cells() const;
    BorrowedScratch make_scratch(int32_t sequence, bool is_borrowed);
    void look_for_blocks(int32_t sequence);
    void check_blocks_allowed(bool checkpoints) const;
    void check_has_position(int32_t sequence) const;
    void check_loadable(size_t blocks, bool has_checkpoint) const;
    StateJoin join_blocks(std::span<const kvf_block> blocks, const void *checkpoint,
                          uint64_t checkpoint_bytes) const;
    void load_joined(int32_t sequence, const StateView &view, const Structure &structure,
                     const BlockMap &map, const BufferOfParts &buffer, Submission &&submission,
                     const kvf_submit_options &options, kvf_job *job);

    // blocking.cpp
    void save_blocking(int32_t sequence, Submission &&submission, const kvf_submit_options &options,
                       kvf_job *job);
    void load_blocking(int32_t sequence, IncomingState &&state, Submission &&submission,
                       const kvf_submit_options &options, kvf_job *job);
    void run_blocking(Submission &&submission, uint64_t bytes, const kvf_submit_options &options,
                      kvf_job *handle, std::function<void(Job &)> work);

    const std::shared_ptr<Engine> engine_;
    const LlamaContext context_;
    const std::shared_ptr<LlamaSequences> sequences_;
    // An attachment has either a tap, or threads that make libllama's own blocking calls.
    std::unique_ptr<Tap> tap_;
    std::unique_ptr<ThreadPool> blocking_;
    std::unique_ptr<KnownStates> states_;

    // The next four are for the context's thread alone.
    HeapCache heap_;
    ScratchCache scratch_;
    std::set<uint32_t> devices_; // those that hold tensors of the context, as far as is known
    bool replaced_ = false;      // the context's address holds something else by now

    // Guards the next member, and whether there is a tap: any thread may call describe().
    mutable std::mutex mutex_;
    bool detached_ = false;
};

} // namespace kvf
