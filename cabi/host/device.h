// The host as a device: regions in host memory, copied by a few threads.
#pragma once

#include <thread>
#include <vector>

#include "jobs/device.h"
#include "jobs/locked_schedule.h"

namespace kvf {

class HostDevice final : public Device {
public:
    HostDevice(JobOwner &owner, uint32_t threads);
    ~HostDevice() override { stop(); }

    std::string describe() const override;
    void submit(Leg &leg) override;
    void extend(Leg &leg, Layout &&part) override;
    void close(Leg &leg) override;
    void cut_short(Leg &leg) override;
    void cut_short_stopping() override;
    Snapshot snapshot(const Layout &layout, unsigned char *buffer) override;
    void stop() override;

private:
    void start_threads();
    void wake(uint32_t priority, uint64_t bytes);
    std::condition_variable &work_of(uint32_t priority) {
        return priority == KVF_PRIORITY_BACKGROUND ? background_work_ : urgent_work_;
    }
    void copy_at_once(Leg &leg);
    void work(uint32_t priority);
    bool is_held_back(uint32_t priority);
    bool ask_gates(std::unique_lock<std::mutex> &lock, uint32_t priority);
    void move_piece(std::unique_lock<std::mutex> &lock, Leg &leg);

    JobOwner &owner_;
    const uint32_t threads_; // that copy for urgent jobs; one more copies for background jobs

    LockedSchedule schedule_;
    std::condition_variable urgent_work_, background_work_;
    bool stopping_ = false;
    std::vector<std::thread> workers_; // started with the first leg
};

} // namespace kvf
