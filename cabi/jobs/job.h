// A job: one submitted transfer, which ends with exactly one completion.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/handle.h"
#include "jobs/block_reports.h"
#include "jobs/device.h"
#include "jobs/gate.h"
#include "jobs/owner.h"
#include "jobs/queue.h"
#include "memory/registry.h"

namespace kvf {

// What is known of a job when it is submitted.
struct JobRequest {
    Direction direction = Direction::Save;
    uint32_t priority = KVF_PRIORITY_BACKGROUND;
    uint32_t mode = 0;
    unsigned char *buffer = nullptr; // of a load: only read
    bool pinned = false;             // the buffer is
    uint64_t user_data = 0;
    uint64_t submitted_ns = 0;
    const void *attachment = nullptr; // that the job belongs to; NULL: none
};

// What recording has found a job to consist of. All of it goes into the completion.
struct JobRecord {
    uint64_t bytes = 0;
    uint64_t fragments = 0;
    uint64_t segments = 0;
    uint64_t listed_ns = 0;
    uint64_t recorded_ns = 0;
    std::optional<uint32_t> mode; // if it differs from the requested mode
};

// What a job holds until it has ended.
struct JobResources {
    std::vector<std::shared_ptr<MemoryUse>> memory; // of the buffer, or of its parts
    std::shared_ptr<Gate> gate;                     // that the job follows; NULL: none
    std::vector<std::shared_ptr<void>> keep_alive;
    // Called once, with the final status, before anybody can see the completion.
    std::function<void(int32_t)> on_end;
    QueueReservation queue;
    Callbacks callback; // one or none
    // Of a save that tells of each block, instead of `memory`. NULL for any other job.
    std::unique_ptr<BlockReports> blocks;
};

class Job final : public Object, public std::enable_shared_from_this<Job> {
public:
    static constexpr ObjectType kType = ObjectType::Job;

    // A job only ever goes on to a later state; it may skip states.
    enum class State : uint8_t {
        Recording, // its submitting call finds out what it consists of; what is known already moves
        Moving,    // all of it is known
        Stopping,  // it was cancelled, or it failed: nothing more of it needs to move
        Ending,    // nothing of it moves; its status is final, and it releases what it holds
        Ended,     // its completion can be seen
    };

    Job(JobOwner *owner, const JobRequest &request, JobResources &&resources);

    const JobRequest request;
    const uint64_t handle = new_handle(ObjectType::Job);

    // NULL if the owner is gone; then the job has ended.
    std::shared_ptr<JobOwner> owner() const { return weak_owner_.lock(); }
    const std::shared_ptr<Gate> &gate() const { return resources_.gate; }
    bool has_callback() const { return !resources_.callback.empty(); }

    bool stopping() const { return state_.load(std::memory_order_acquire) == State::Stopping; }
    // Fails the job with KVF_ERR_CANCELLED, and cuts its legs short.
    void cancel();
    // Marks the job as stopping. The first reason stands; one that comes when the job is ending
    // comes too late.
    void fail(int32_t status, const std::string &detail);
    // Has the devices end the legs of a job that is stopping. In constant time, however many jobs
    // there are. A leg that is submitted later ends at once. For callers that hold no lock: the job
    // may end here.
    void cut_short();

    // Blocks until the gate is open, or the job is stopping.
    void wait_for_gate() const;
    void note_started(uint64_t ns);
    // A copy that names the buffer did not end, and may still touch it.
    void mark_buffer_lost();

    // The job ends when all work on it has ended: that of its submitting call, of its legs, and
    // what others have begun.
    void begin_work() { work_.fetch_add(1, std::memory_order_relaxed); }
    void end_work();
    void leg_ended(Leg &leg); // for devices: ends the leg's work
    // For devices, before the leg of these pieces ends: they are where they belong. Pieces of a job
    // that is stopping may not have moved; they do not count.
    void moved(std::span<const Piece> pieces) {
        if (resources_.blocks && !stopping()) count_moved(pieces);
    }

    // For the submitting call, before it ends its work.
    Leg &add_leg(std::unique_ptr<Leg> leg);
    const std::vector<std::unique_ptr<Leg>> &legs() const { return legs_; }
    // Before the layout is handed to a device.
    void expect(const Layout &layout) {
        if (resources_.blocks) resources_.blocks->expect(layout);
    }
    // All layouts have been expected. Tells of blocks that are whole already.
    void commit(const JobRecord &record) noexcept;
    // Instead of commit(): the submitting call fails. Nobody is told of the job's end.
    void discard() noexcept { discarded_ = true; }

    DeviceSet devices() const { return devices_.load(); } // of the legs

    // Sets the words to 1 when the job has ended; now, if it has. The words must stay until then.
    void signal_at_end(const std::vector<std::atomic<uint32_t> *> &words);

    bool ended(kvf_completion *completion);
    bool wait(int64_t timeout_ns, kvf_completion *completion);

private:
    // Every change of the state happens here. False if the job is there already, or further.
    bool enter(State next) noexcept;
    void end();
    void count_moved(std::span<const Piece> pieces);
    void tell_of_block(size_t block);
    kvf_completion begin_completion() const;
    void make_completion();
    void release_resources();
    void show_end();
    Leg *leg(size_t index);

    JobOwner *const owner_; // valid until the job has ended
    const std::weak_ptr<JobOwner> weak_owner_;
    JobResources resources_;
    JobRecord record_;
    bool discarded_ = false;

    std::atomic<State> state_{State::Recording};
    std::atomic<uint32_t> work_{1}; // the submitting call's, to begin with
    std::atomic<uint64_t> started_ns_{0};
    std::atomic<DeviceSet> devices_{0};
    // Grows under the lock. The submitting call, which alone lets it grow, reads it without.
    std::vector<std::unique_ptr<Leg>> legs_;

    std::mutex mutex_; // guards what follows, and the states from Stopping on
    std::condition_variable ended_;
    std::vector<std::atomic<uint32_t> *> words_; // to be set at the end
    int32_t status_ = KVF_OK;
    std::string detail_;
    kvf_completion completion_{};
};

} // namespace kvf
