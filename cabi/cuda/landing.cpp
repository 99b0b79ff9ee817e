#include "cuda/landing.h"

#include <algorithm>
#include <new>
#include <thread>

#include "memory/layout_builder.h"

namespace kvf {
namespace {

constexpr uint64_t kGrain = 2 << 20; // in which drivers hand out device memory
constexpr uint64_t kPiece = 16 << 20;
constexpr uint32_t kBlocks = 128; // of a kernel's grid; on an H200 more were slower
// A field's tables: of device memory, and as much is pinned.
constexpr uint64_t kTableBytes = CudaResidentTable::kBytes + CudaRowTable::kBytes;
constexpr std::chrono::microseconds kPoll{10};

} // namespace

// Memory for one state, tables of rows, and a stream.
class CudaLandings::Field {
public:
    Field(const CudaContext &context, uint64_t bytes) : context_(context), bytes_(bytes) {
        const CudaCurrent current(context_);
        const CudaDriver &driver = context_.driver();
        try {
            driver.check(driver.cuMemAlloc(&memory_, bytes + kTableBytes), "cuMemAlloc");
            table_ = std::make_unique<CudaResidentTable>(context_, memory_ + bytes);
            rows_ = std::make_unique<CudaRowTable>(context_,
                                                   memory_ + bytes + CudaResidentTable::kBytes);
            driver.check(driver.cuStreamCreateWithPriority(&stream_, CU_STREAM_NON_BLOCKING, 0),
                         "cuStreamCreateWithPriority");
        } catch (...) {
            release();
            throw;
        }
    }
    ~Field() {
        try {
            const CudaCurrent current(context_);
            release();
        } catch (const Error &) {
            // The context is gone, and everything in it.
        }
    }
    Field(const Field &) = delete;
    Field &operator=(const Field &) = delete;

    uint64_t bytes() const { return bytes_; }
    CUdeviceptr memory() const { return memory_; }
    CUstream stream() const { return stream_; }
    CudaResidentTable &table() { return *table_; }
    CudaRowTable &rows() { return *rows_; }

private:
    void release() {
        table_.reset();
        rows_.reset();
        if (stream_) context_.driver().cuStreamDestroy(stream_);
        if (memory_) context_.driver().cuMemFree(memory_);
    }

    const CudaContext &context_;
    const uint64_t bytes_;
    CUdeviceptr memory_ = 0;
    CUstream stream_ = nullptr;
    std::unique_ptr<CudaResidentTable> table_;
    std::unique_ptr<CudaRowTable> rows_; // of a piece that the other cannot have
};

class CudaLandings::One final : public Landing, public std::enable_shared_from_this<One> {
public:
    One(CudaLandings &landings, uint64_t bytes)
        : landings_(landings), context_(landings.context_), driver_(context_.driver()),
          bytes_(bytes) {}
    ~One() override { give_back(); }
    void set_field(std::unique_ptr<Field> field) { field_ = std::move(field); }

    Layout approach() const override {
        LayoutBuilder builder;
        builder.add(field_->memory(), 0, bytes_);
        return builder.finish();
    }
    void advance(uint64_t offset) noexcept override {
        change([&] { here_ = std::max(here_, offset); });
    }
    void arrive() noexcept override {
        change([&] {
            here_ = bytes_;
            arrived_ = true;
        });
    }
    void land(std::shared_ptr<Job> job, Layout &&layout) noexcept override {
        change([&] {
            job_ = std::move(job);
            layout_ = std::move(layout);
            cursor_ = Cursor(layout_);
        });
    }

private:
    template <class Function>
    void change(Function &&function) noexcept;
    void work() noexcept;
    void move(uint64_t here);
    void move(const Piece &piece);
    void launch(const CudaRows &rows, uint64_t offset);
    void move_runs(const Piece &piece);
    void synchronize();
    void give_back() noexcept;

    CudaLandings &landings_;
    const CudaContext &context_;
    const CudaDriver &driver_;
    std::unique_ptr<Field> field_;
    const uint64_t bytes_;

    std::mutex mutex_;
    uint64_t here_ = 0; // what lies before it in the buffer has been brought
    bool arrived_ = false;
    bool working_ = false;     // a task of the crew's will look at the above again
    std::shared_ptr<Job> job_; // since land(), and until it was let go

    // The task's own, since land().
    Layout layout_;
    Cursor cursor_;
    Piece next_; // has been taken from the cursor; bytes == 0: none
    bool holds_table_ = false;
};

// Changes what the task looks at, and sees to it that there is one if there is something to do.
template <class Function>
void CudaLandings::One::change(Function &&function) noexcept {
    {
        std::lock_guard lock(mutex_);
        function();
        if (working_ || !job_) return;
        working_ = true;
    }
    try {
        landings_.crew_.add([self = shared_from_this()] { self->work(); });
    } catch (const std::exception &) {
        work(); // there is no memory for a task
    }
}

void CudaLandings::One::work() noexcept {
    for (uint64_t moved = 0;;) {
        uint64_t here;
        bool arrived;
        {
            std::lock_guard lock(mutex_);
            here = here_;
            arrived = arrived_;
            if (here <= moved && !arrived) {
                working_ = false;
                return;
            }
        }
        if (!job_->stopping()) {
            try {
                const CudaCurrent current(context_);
                move(here);
            } catch (const Error &error) {
                if (error.status == KVF_ERR_DEVICE_LOST) context_.note_lost();
                job_->fail(error.status, error.detail);
            } catch (const std::bad_alloc &) {
                job_->fail(KVF_ERR_OUT_OF_MEMORY, "");
            }
            if (job_->stopping()) job_->cut_short(); // the rest of it need not be brought
        }
        moved = here;
        if (!arrived) continue;
        std::shared_ptr<Job> job;
        {
            std::lock_guard lock(mutex_);
            job = std::move(job_);
        }
        give_back();
        job->end_work();
        return;
    }
}

// Whatever belongs somewhere and is here.
void CudaLandings::One::move(uint64_t here) {
    const auto take = [this] {
        if (next_.bytes == 0 && !cursor_.at_end())
            next_ = cursor_.next(kPiece, CudaRowTable::kRows);
        return next_.bytes > 0;
    };
    try {
        while (take()) {
            const kvf_region &block = next_.block;
            uint64_t end = 0;
            if (next_.runs) {
                for (uint64_t i = next_.is_packed() ? next_.count - 1 : 0; i < next_.count; ++i) {
                    end = std::max(end, next_.run(i).offset + next_.run(i).bytes);
                }
            } else {
                end = block.offset + (block.rows - 1) * block.buffer_pitch + block.width;
            }
            if (end > here) break;
            move(next_);
            next_ = {};
        }
    } catch (...) {
        try {
            if (!context_.given_up()) synchronize(); // what was queued must not outlive this
        } catch (const Error &) {
            // Nothing is under way any more that could be waited for.
        }
        throw;
    }
    synchronize();
}

void CudaLandings::One::move(const Piece &piece) {
    const kvf_region &block = piece.block;
    const CUdeviceptr from = field_->memory() + block.offset;
    const CUstream stream = field_->stream();
    if (piece.runs) return move_runs(piece);
    if (block.rows == 1) {
        return driver_.check(driver_.cuMemcpyDtoDAsync(block.address, from, block.width, stream),
                             "cuMemcpyDtoDAsync");
    }
    if (piece.is_packed()) return launch(CudaRows::of(block, 0), block.offset);
    for (uint64_t i = 0; i < block.rows; ++i) {
        driver_.check(driver_.cuMemcpyDtoDAsync(block.address + i * block.pitch,
                                                from + i * block.buffer_pitch, block.width, stream),
                      "cuMemcpyDtoDAsync");
    }
}

void CudaLandings::One::launch(const CudaRows &rows, uint64_t offset) {
    landings_.kernels_.launch(Direction::Load, field_->memory() + offset, rows, kBlocks,
                              field_->stream());
}

void CudaLandings::One::move_runs(const Piece &piece) {
    CudaResidentTable &table = field_->table();
    bool acquired = table.acquire(*piece.table);
    if (!acquired && holds_table_) {
        synchronize(); // the table that it has is in use
        table.release();
        holds_table_ = false;
        acquired = table.acquire(*piece.table);
    }
    if (acquired) {
        if (holds_table_) table.release(); // of the two
        holds_table_ = true;
        table.send(field_->stream());
        return launch(table.rows(piece, 0), piece.offset());
    }
    CudaRowTable &rows = field_->rows();
    synchronize(); // the piece before this may use it
    rows.clear();
    if (rows.add_as_in_buffer(piece)) {
        rows.send(field_->stream());
        return launch(rows.rows(), piece.offset());
    }
    for (uint64_t i = 0; i < piece.count; ++i) {
        const Run run = piece.run(i);
        driver_.check(driver_.cuMemcpyDtoDAsync(run.address, field_->memory() + run.offset,
                                                run.bytes, field_->stream()),
                      "cuMemcpyDtoDAsync");
    }
}

void CudaLandings::One::synchronize() {
    const uint64_t begin = now_ns();
    for (;;) {
        const CUresult result = driver_.cuStreamQuery(field_->stream());
        if (result != CUDA_ERROR_NOT_READY) return driver_.check(result, "cuStreamQuery");
        if (now_ns() - begin > stuck_ns()) {
            context_.give_up();
            throw Error(KVF_ERR_DEVICE_LOST, "a copy did not end");
        }
        std::this_thread::sleep_for(kPoll);
    }
}

void CudaLandings::One::give_back() noexcept {
    if (!field_) return;
    if (holds_table_) field_->table().release();
    holds_table_ = false;
    std::lock_guard lock(landings_.mutex_);
    landings_.idle_.push_back(std::move(field_)); // there is room
}

CudaLandings::CudaLandings(const CudaContext &context, const CudaKernels &kernels, ThreadPool &crew)
    : context_(context), kernels_(kernels), crew_(crew) {}

CudaLandings::~CudaLandings() { trim(); }

std::shared_ptr<Landing> CudaLandings::make(uint64_t bytes) {
    const uint64_t wanted = (bytes + kGrain - 1) / kGrain * kGrain;
    auto one = std::make_shared<One>(*this, bytes); // nothing may fail once there is a field
    std::unique_ptr<Field> field;
    bool none_will_do = false;
    {
        // The smallest that will do, if it is not far too large.
        std::lock_guard lock(mutex_);
        auto best = idle_.end();
        for (auto it = idle_.begin(); it != idle_.end(); ++it) {
            const uint64_t size = (*it)->bytes();
            if (size < wanted || size / 4 > wanted) continue;
            if (best == idle_.end() || size < (*best)->bytes()) best = it;
        }
        if (best != idle_.end()) {
            field = std::move(*best);
            idle_.erase(best);
        } else {
            none_will_do = !idle_.empty();
        }
    }
    if (!field) {
        field = allocate(wanted);
        if (!field) {
            trim();
            field = allocate(wanted);
        }
        if (!field) return nullptr;
        // Freeing waits for all that the device is doing: not the caller.
        if (none_will_do) crew_.add([this] { trim(); });
        std::lock_guard lock(mutex_);
        idle_.reserve(made_ + 1); // giving back must not fail
        ++made_;
    }
    one->set_field(std::move(field));
    return one;
}

// NULL where there is no memory for it.
std::unique_ptr<CudaLandings::Field> CudaLandings::allocate(uint64_t bytes) const {
    try {
        return std::make_unique<Field>(context_, bytes);
    } catch (const Error &error) {
        if (error.status != KVF_ERR_OUT_OF_MEMORY) throw;
        return nullptr;
    }
}

bool CudaLandings::empty() const {
    std::lock_guard lock(mutex_);
    return made_ == 0;
}

void CudaLandings::trim() noexcept {
    for (;;) {
        std::unique_ptr<Field> field; // goes without the lock
        std::lock_guard lock(mutex_);
        if (idle_.empty()) return;
        field = std::move(idle_.back());
        idle_.pop_back();
        --made_;
    }
}

uint64_t CudaLandings::pinned_bytes() const {
    std::lock_guard lock(mutex_);
    return made_ * kTableBytes;
}

} // namespace kvf
