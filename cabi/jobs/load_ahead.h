// A load ahead: the state is staged in device memory of its own while libllama still takes cells
// and lists fragments. When it is known where the bytes belong, they are copied from there to their
// places, within the device.
#pragma once

#include <memory>
#include <vector>

#include "memory/pieces.h"

namespace kvf {

class Job;

// A run of bytes of a buffer.
struct BufferPart {
    uint64_t offset;
    uint64_t bytes;
};

// Where the parts lie in device memory of their own: one behind the other, in the order in which
// they were given. They are staged and placed in this order, whatever their order in the buffer is.
class StagedParts {
public:
    // The parts do not overlap.
    explicit StagedParts(const std::vector<BufferPart> &parts);

    uint64_t bytes() const { return bytes_; } // of device memory
    // Where the byte at `offset` in the buffer lies there. It must be of a part.
    uint64_t place_of(uint64_t offset) const;
    // The parts as runs, in their order, for device memory that begins at `address`. Each part is
    // one region, however small, because a LayoutBuilder would put small parts behind all others.
    Layout layout(uint64_t address) const;

private:
    struct Part {
        BufferPart in_buffer;
        uint64_t begin; // in the device memory
    };
    std::vector<Part> by_offset_; // in the order of the buffer
    uint64_t bytes_ = 0;
};

// Device memory for one state, and the copies from there. Any thread may call these functions.
class LoadAhead {
public:
    virtual ~LoadAhead() = default;

    // The layout of the leg that stages all parts of the buffer.
    virtual Layout staging_layout() const = 0;
    // How many bytes are staged before the byte at `offset` in the buffer, which is of a part.
    virtual uint64_t bytes_before(uint64_t offset) const = 0;
    // The first `bytes` have been staged.
    virtual void staged_up_to(uint64_t bytes) noexcept = 0;
    // The leg has ended: the whole buffer has been staged, or the job is stopping.
    virtual void staging_ended() noexcept = 0;
    // Tells where the bytes belong. Offsets of the layouts are those in the device memory
    // (StagedParts); bytes are placed in the order of the layouts. Called once, before or after the
    // bytes have been staged. Calls job->end_work() once: when all bytes are in their places, or
    // when the job is stopping and no copy from here is under way.
    virtual void place(std::shared_ptr<Job> job, Parts &&parts) noexcept = 0;
};

} // namespace kvf
