// What a submitting call knows of a transfer beforehand, and what it learns while it records.
#pragma once

#include "jobs/fences.h"
#include "jobs/job.h"

namespace kvf {

struct Submission {
    Direction direction = Direction::Save;
    unsigned char *buffer = nullptr;
    uint64_t buffer_bytes = 0;
    // The parts of the buffer that the job uses, where it uses several and not all of it. Of a save
    // of blocks each is a block: Layout::block is its index here.
    std::vector<std::pair<const void *, uint64_t>> parts;
    uint32_t mode = 0;
    uint64_t submitted_ns = 0;
    const void *attachment = nullptr; // that it belongs to; NULL: none
    std::shared_ptr<Gate> gate;       // the gate that the job waits for: Engine::make_gate()
    std::vector<std::shared_ptr<void>> keep_alive; // until the job has ended
    std::function<void(int32_t)> on_end;           // as of JobResources
    std::shared_ptr<Fence> fence;                  // of a llama transfer: lowered at its end
    // Called when the job becomes one of those in flight. May throw; then there is no job.
    std::function<void()> on_entry;
};

using Layouts = std::vector<std::pair<uint32_t, Layout>>; // device, layout

struct Recorded : JobRecord {
    Layouts layouts;
};

} // namespace kvf
