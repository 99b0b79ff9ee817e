// What a submitting call knows of a transfer beforehand, and what it learns while it records.
#pragma once

#include "jobs/fences.h"
#include "jobs/job.h"

namespace kvf {

// What is known before anything is recorded.
struct Submission {
    Direction direction = Direction::Save;
    unsigned char *buffer = nullptr;
    uint64_t buffer_bytes = 0;
    uint32_t mode = 0;
    uint64_t submitted_ns = 0;
    const void *owned_by = nullptr;
    std::shared_ptr<Gate> gate;              // what it follows: Engine::make_gate()
    std::vector<std::shared_ptr<void>> keep; // until the job has ended
    std::function<void(int32_t)> on_end;
    std::shared_ptr<Fence> fence; // of a llama transfer: lowered at its end
    // Happens with the job's entry among those in flight; may throw, and then there is no job.
    std::function<void()> on_entry;
};

using Layouts = std::vector<std::pair<uint32_t, Layout>>; // device, layout

// What it has turned out to consist of.
struct Recorded {
    Layouts layouts;
    uint64_t bytes = 0; // these three for the completion
    uint64_t fragments = 0;
    uint64_t segments = 0;
    uint64_t listed_ns = 0;
    uint64_t recorded_ns = 0;
};

} // namespace kvf
