#include "llama/recorder.h"

#include <algorithm>
#include <new>

namespace kvf {
namespace {

// In order, and those that touch as one.
std::vector<MemoryRange> joined(std::vector<MemoryRange> ranges) {
    const auto is_before = [](const MemoryRange &a, const MemoryRange &b) {
        return a.begin < b.begin;
    };
    // Mostly they come in order, and to sort eight thousand takes a tenth of a millisecond.
    if (!std::is_sorted(ranges.begin(), ranges.end(), is_before))
        std::sort(ranges.begin(), ranges.end(), is_before);
    size_t kept = 0;
    for (const MemoryRange &range : ranges) {
        if (kept > 0 && range.begin <= ranges[kept - 1].end) {
            ranges[kept - 1].end = std::max(ranges[kept - 1].end, range.end);
        } else {
            ranges[kept++] = range;
        }
    }
    ranges.resize(kept);
    return ranges;
}

} // namespace

Recording::Recording(Recorder &recorder) { recorder_ = &recorder; }
Recording::~Recording() {
    recorder_->report_calls();
    recorder_ = nullptr;
}

Recorder::Recorder(Direction direction, const void *buffer, uint64_t bytes, uint32_t devices,
                   Locate locate, HeapCache &heap, std::atomic<uint64_t> *total_calls)
    : direction_(direction), buffer_(reinterpret_cast<uint64_t>(buffer)), buffer_bytes_(bytes),
      locate_(std::move(locate)), heap_(heap), total_calls_(total_calls), builders_(devices),
      early_builders_(devices) {}

// For the first fragment of a tensor, and for all of a tensor that is not plain.
bool Recorder::record_with_care(const ggml_tensor *tensor, uint64_t place, uint64_t offset,
                                uint64_t bytes, const GgmlApi &ggml) noexcept {
    // This runs inside destructors of libllama's, out of which nothing may be thrown.
    try {
        // libllama's own copy might fail likewise, and end the process.
        if (!failure_ && tensor != tensor_) begin_tensor(tensor, offset, bytes, ggml);
        if (!failure_ && !builder_) {
            // No device of the engine reaches this tensor: the original call, here and now.
            ++direct_fragments_;
            direct_bytes_ += bytes;
            return false;
        }
        ++calls_;
        if (failure_) return true;
        const uint64_t address = tensor_address_ + offset;
        note_reached(address, bytes);
        add_with_care(address, place, bytes);
    } catch (...) {
        note_failure();
    }
    return true;
}

void Recorder::note_failure() noexcept {
    if (!failure_) failure_ = std::current_exception();
    plain_tensor_ = nullptr;
}

// For the first tensor, and for tensors with early ranges, or whose cells other transfers guard.
// Fragments are recorded in the order of the buffer, so that early ranges are met in order.
void Recorder::add_with_care(uint64_t address, uint64_t place, uint64_t bytes) {
    if (tensors_.size() == 1) first_tensor_.push_back({address, address + bytes});
    // The cell may have been one of a transfer that follows a stream, and that transfer still needs
    // it.
    if (direction_ == Direction::Load && Fence::any_stops_rows())
        Fence::wait({address, address + bytes}, Access::WriteRows);
    while (next_early_ < early_.size() && early_[next_early_].end <= place) ++next_early_;
    for (size_t i = next_early_; i < early_.size() && early_[i].begin < place + bytes; ++i) {
        const uint64_t before = std::max(early_[i].begin, place) - place;
        if (before) builder_->add(address, place, before);
        const uint64_t early = std::min(early_[i].end - place, bytes) - before;
        early_builder_->add(address + before, place + before, early);
        address += before + early;
        place += before + early;
        bytes -= before + early;
    }
    if (bytes) builder_->add(address, place, bytes);
}

void Recorder::begin_tensor(const ggml_tensor *tensor, uint64_t offset, uint64_t bytes,
                            const GgmlApi &ggml) {
    if (!listed_ns_) listed_ns_ = now_ns();
    LayoutBuilder *const former = builder_;
    if (tensors_.size() == 1) end_first_tensor();
    tensor_ = tensor;
    plain_tensor_ = nullptr;
    tensor_address_ = reinterpret_cast<uint64_t>(ggml.get_data(tensor));
    tensors_.push_back(tensor_address_);
    if (reached_.begin < reached_.end) memory_.push_back(reached_);
    reached_ = {UINT64_MAX, 0};
    // Fences around this context's memory are raised by the thread that records, so none can appear
    // while this call records.
    const bool needs_care = tensors_.size() == 1 || !early_.empty() ||
                            (direction_ == Direction::Load && Fence::any_stops_rows());
    const int64_t device = locate_(tensor_address_ + offset, bytes);
    if (former) former->begin_tensor();
    if (early_builder_) early_builder_->begin_tensor();
    builder_ = device < 0 ? nullptr : &builders_[static_cast<size_t>(device)];
    early_builder_ = device < 0 ? nullptr : &early_builders_[static_cast<size_t>(device)];
    if (builder_ && !needs_care) plain_tensor_ = tensor;
    if (former && sink_ && !failure_ && former->bytes() >= least_part_) {
        Layout part = former->take();
        sunk_segments_ += part.segments();
        sunk_bytes_ += part.bytes;
        sink_(static_cast<uint32_t>(former - builders_.data()), std::move(part));
    }
}

// Called before any byte of a load may move. If the sequence of another transfer has lost cells,
// this load may have been given those cells.
void Recorder::end_first_tensor() {
    first_tensor_ = joined(std::move(first_tensor_));
    if (direction_ == Direction::Load && Fence::any()) Fence::wait_for_rows(first_tensor_);
}

Recorded Recorder::finish() {
    if (failure_) {
        try {
            std::rethrow_exception(failure_);
        } catch (const std::bad_alloc &) {
            throw Error(KVF_ERR_OUT_OF_MEMORY, "while recording the layout");
        }
    }
    if (tensors_.size() == 1) end_first_tensor();
    Recorded result;
    result.listed_ns = listed_ns_;
    result.recorded_ns = now_ns();
    result.fragments = direct_fragments_;
    result.segments = direct_fragments_ + sunk_segments_;
    result.bytes = direct_bytes_ + sunk_bytes_;
    const auto collect = [&result](std::vector<LayoutBuilder> &builders, Layouts &layouts) {
        for (uint32_t device = 0; device < builders.size(); ++device) {
            result.fragments += builders[device].fragments();
            Layout layout = builders[device].finish();
            if (layout.empty()) continue;
            result.segments += layout.segments();
            result.bytes += layout.bytes;
            layouts.emplace_back(device, std::move(layout));
        }
    };
    collect(builders_, result.layouts);
    collect(early_builders_, early_layouts_);
    return result;
}

std::vector<MemoryRange> Recorder::first_tensor() const { return first_tensor_; }

std::vector<MemoryRange> Recorder::memory() const {
    std::vector<MemoryRange> ranges(memory_);
    if (reached_.begin < reached_.end) ranges.push_back(reached_);
    return joined(std::move(ranges));
}

} // namespace kvf
