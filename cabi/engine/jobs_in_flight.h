// The jobs that an engine has in flight, and its attachments: what keeps it from being destroyed.
#pragma once

#include <condition_variable>
#include <functional>
#include <mutex>
#include <unordered_set>

#include "jobs/job.h"

namespace kvf {

// Thread-safe.
class JobsInFlight {
public:
    // Must not call back.
    using Matches = std::function<bool(const Job &)>;

    // Throws KVF_ERR_CLOSED after close().
    void check_open() const;
    // From here on the job is in flight, until leave(). Throws KVF_ERR_CLOSED, and what `on_entry`
    // throws; then the job is not in flight. `on_entry` is called under the lock.
    template <class Function>
    void enter(Job &job, Function &&on_entry) {
        std::lock_guard lock(mutex_);
        check_open_locked();
        const auto entry = jobs_.insert(&job).first;
        try {
            on_entry();
        } catch (...) {
            jobs_.erase(entry);
            throw;
        }
    }
    void leave(Job &job) noexcept;

    size_t count() const;
    // Fails the jobs that match with KVF_ERR_CANCELLED. Their legs are not cut short: that could
    // end a job, which then leaves under the lock.
    void mark_cancelled(const Matches &matches);
    // Blocks until no job in flight matches.
    void wait(const Matches &matches);

    // Between the two calls close() is refused. attach() throws KVF_ERR_CLOSED after close().
    void attach();
    void detach() noexcept;

    // Lets no more jobs in, and blocks until the last one has left. Throws KVF_ERR_BUSY if
    // something is attached, and KVF_ERR_INVALID_HANDLE if it was called before; then nothing has
    // changed.
    void close();

private:
    void check_open_locked() const;

    mutable std::mutex mutex_;
    std::condition_variable changed_;
    std::unordered_set<Job *> jobs_;
    uint32_t attached_ = 0;
    bool closed_ = false;
};

} // namespace kvf
