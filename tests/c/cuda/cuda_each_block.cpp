// A save that tells of each block: a completion when the whole block is in its buffer, which is
// free from then on; the job's own completion once, and last. On the host, on a device and on both;
// however the job ends.
#include <map>
#include <mutex>

#include "../refuse_memory.hpp"
#include "blocks.hpp"
#include "inside.hpp"

namespace {

constexpr uint32_t kNone = UINT32_MAX;

// Where the bytes of the blocks are. Both: the tensors of a block are of the device and of the
// host.
enum class Source { Host, Device, Both };
constexpr Source kSources[] = {Source::Host, Source::Device, Source::Both};

std::mutex called_mutex;
std::vector<kvf_completion> called;

void note_call(const kvf_completion *completion) {
    std::lock_guard lock(called_mutex);
    called.push_back(*completion);
}

std::vector<kvf_completion> take_calls() {
    std::lock_guard lock(called_mutex);
    return std::exchange(called, {});
}

// A cache with random content, in host memory and on the device. Saves change neither, so that
// tests of one size share them.
struct Cache {
    explicit Cache(Bytes &&bytes) : content(std::move(bytes)), on_device(content) {}

    const Bytes content;
    const DeviceMemory on_device;
};

std::mutex caches_mutex;
std::map<uint64_t, Cache> caches; // by size

const Cache &cache_of(Random &random, uint64_t bytes) {
    std::lock_guard lock(caches_mutex);
    const auto found = caches.find(bytes);
    if (found != caches.end()) return found->second;
    return caches.try_emplace(bytes, random_bytes(random, bytes)).first->second;
}

struct Given {
    Blocks blocks;
    Source source = Source::Device;
    Kind kind = Kind::Pool;
    uint32_t priority = KVF_PRIORITY_URGENT;
    bool owns_gaps = true;
    bool snapshot = false; // of the device: the job moves a copy
    kvf_completion_callback callback = nullptr;
    uint64_t stream = 0; // to be followed; 0: none
};

// A cache, a buffer for each block, and the job that saves them.
class Test {
public:
    Test(Random &random, std::shared_ptr<kvf::Engine> engine, const Given &given)
        : given_(given), engine_(std::move(engine)), own_(registered(engine_)),
          cache_(cache_of(random, given.blocks.device_bytes())) {
        const uint64_t bytes = block_bytes();
        for (uint64_t i = 0; i < count(); ++i) {
            buffers_.push_back(std::make_unique<Buffer>(own_, given.kind, bytes));
            buffers_[i]->fill(0xAA);
            begin_ = std::min(begin_, buffers_[i]->data());
            end_ = std::max(end_, buffers_[i]->data() + bytes);
        }
        CHECK_OK(kvf_queue_create(&queue_));
    }
    ~Test() {
        CHECK(!job_ || told_.back() == kNone); // the job has ended
        CHECK_OK(kvf_queue_destroy(queue_));
        buffers_.clear();
        kvf::withdraw<kvf::Engine>(own_);
    }
    Test(const Test &) = delete;
    Test &operator=(const Test &) = delete;

    uint64_t count() const { return given_.blocks.count; }
    kvf_queue queue() const { return queue_; }
    const std::shared_ptr<kvf::Job> &job() const { return job_; }
    // The blocks that were told of, in that order; kNone for the job.
    const std::vector<uint32_t> &told() const { return told_; }
    Buffer &buffer(uint32_t block) const { return *buffers_[block]; }

    kvf_submit_options options() const {
        kvf_submit_options options = options_of(given_.priority);
        options.queue = queue_;
        options.callback = given_.callback;
        options.user_data = reinterpret_cast<uint64_t>(this);
        options.flags = KVF_SUBMIT_EACH_BLOCK;
        if (given_.stream) options.flags |= KVF_SUBMIT_FOLLOW_STREAM;
        options.stream = given_.stream;
        return options;
    }
    kvf::Submission submission() const {
        kvf::Submission submission =
            make_submission(Way::Save, begin_, static_cast<uint64_t>(end_ - begin_));
        for (const auto &buffer : buffers_)
            submission.parts.emplace_back(buffer->data(), buffer->bytes());
        submission.gate = engine_->make_gate(options(), 0);
        return submission;
    }
    kvf::Layouts layouts() const {
        kvf::Layouts layouts;
        for (uint32_t block = 0; block < count(); ++block) {
            const auto distance = static_cast<uint64_t>(buffers_[block]->data() - begin_);
            if (given_.source != Source::Host)
                layouts.emplace_back(1, layout(block, cache_.on_device.address(), distance));
            if (given_.source == Source::Device) continue;
            const uint64_t behind = given_.source == Source::Both ? part_bytes() : 0;
            layouts.emplace_back(0, layout(block, reinterpret_cast<uint64_t>(cache_.content.data()),
                                           distance + behind));
        }
        return layouts;
    }
    void submit() {
        kvf::Submission submission = this->submission();
        kvf::Recorded recorded;
        recorded.layouts = layouts();
        recorded.bytes = count() * block_bytes();
        for (auto &[device, layout] : recorded.layouts) {
            if (!given_.snapshot) break;
            auto snapshot = engine_->device(device).snapshot(layout, begin_);
            snapshot.layout.block = layout.block;
            layout = std::move(snapshot.layout);
            submission.keep_alive.push_back(std::move(snapshot.memory));
        }
        job_ = kvf::submit_job(*engine_, std::move(submission), std::move(recorded), options(),
                               nullptr);
    }

    // Takes the next completion and checks it. False: none came in time.
    bool take(int64_t timeout_ns = 60 * SECONDS) {
        kvf_completion done;
        if (kvf_queue_take(queue_, &done, sizeof done, 1, timeout_ns) == 0) return false;
        CHECK(told_.empty() || told_.back() != kNone); // the job's comes last
        CHECK(done.user_data == reinterpret_cast<uint64_t>(this) &&
              done.finished_ns >= done.started_ns);
        if (done.kind == KVF_COMPLETION_JOB) {
            CHECK(done.block == 0 && (done.status != KVF_OK || told_.size() == count()));
            status_ = done.status;
            told_.push_back(kNone);
            return true;
        }
        CHECK(done.kind == KVF_COMPLETION_BLOCK && done.block < count() && done.status == KVF_OK);
        CHECK(std::count(told_.begin(), told_.end(), done.block) == 0);
        CHECK(done.bytes == block_bytes() && done.fragments == 0 && done.segments == 0);
        check_whole(done.block);
        told_.push_back(done.block);
        return true;
    }
    int32_t take_all() {
        while (told_.empty() || told_.back() != kNone) CHECK(take());
        kvf_completion none;
        CHECK(kvf_queue_take(queue_, &none, sizeof none, 1, 0) == 0);
        return status_;
    }
    bool was_told(uint32_t block) const {
        return std::count(told_.begin(), told_.end(), block) == 1;
    }
    void check_whole(uint32_t block) const {
        Bytes expected(block_bytes(), 0xAA);
        const auto model = [&](uint64_t behind) {
            given_.blocks.for_each_fragment(
                block, 0, [] {},
                [&](uint64_t address, uint64_t offset, uint64_t bytes) {
                    std::copy_n(&cache_.content[address], bytes, &expected[behind + offset]);
                });
        };
        model(0);
        if (given_.source == Source::Both) model(part_bytes());
        CHECK(buffers_[block]->holds(expected));
    }
    // The library is done with the buffer: to unregister or free it would be refused else.
    void free(uint32_t block) { buffers_[block].reset(); }

private:
    static kvf_engine registered(const std::shared_ptr<kvf::Engine> &engine) {
        const kvf_engine handle = kvf::new_handle(kvf::ObjectType::Engine);
        kvf::publish(handle, engine);
        return handle;
    }
    uint64_t part_bytes() const { return given_.blocks.buffer_bytes(); }
    uint64_t block_bytes() const { return part_bytes() * (given_.source == Source::Both ? 2 : 1); }
    kvf::Layout layout(uint32_t block, uint64_t address, uint64_t distance) const {
        kvf::Layout layout = given_.blocks.layout(block, address, distance, given_.owns_gaps);
        layout.block = block;
        return layout;
    }

    const Given given_;
    const std::shared_ptr<kvf::Engine> engine_;
    const kvf_engine own_; // a handle of the engine
    const Cache &cache_;
    std::vector<std::unique_ptr<Buffer>> buffers_;
    unsigned char *begin_ = reinterpret_cast<unsigned char *>(UINTPTR_MAX), *end_ = nullptr;
    kvf_queue queue_ = 0;
    std::shared_ptr<kvf::Job> job_;
    std::vector<uint32_t> told_;
    int32_t status_ = KVF_OK;
};

constexpr Blocks kSmall{Cells::InTurn, 5, 4, 32, 100};
// Of 32 MiB, which are 32 copies of two slots or more.
constexpr Blocks kLarge{Cells::Contiguous, 8, 4, 128, 8192};
// While this copy is held, its slot has not ended, and all others end.
constexpr uint64_t kHeldCopy = 32;

void every_way(Random &random, const std::shared_ptr<kvf::Engine> &engine) {
    bool background = false;
    for (const Cells cells : {Cells::Contiguous, Cells::InTurn, Cells::Transposed, Cells::AtRandom,
                              Cells::InTurnInPart}) {
        for (const Source source : kSources) {
            for (const Kind kind : {Kind::Pool, Kind::Registered, Kind::Pageable}) {
                for (const bool snapshot : {false, true}) {
                    background = !background;
                    Given given{{cells, 5, 4, 64, 256}, source, kind};
                    given.priority = background ? KVF_PRIORITY_BACKGROUND : KVF_PRIORITY_URGENT;
                    given.snapshot = snapshot;
                    given.owns_gaps = source != Source::Both;
                    Test test(random, engine, given);
                    test.submit();
                    CHECK_OK(test.take_all());
                }
            }
        }
    }
    for (const uint32_t priority : {KVF_PRIORITY_BACKGROUND, KVF_PRIORITY_URGENT}) {
        for (const Source source : kSources) {
            Given given{kLarge, source, Kind::Pool, priority};
            given.owns_gaps = source != Source::Both;
            Test test(random, engine, given);
            test.submit();
            CHECK_OK(test.take_all());
        }
    }
    Test one(random, engine, {{Cells::AtRandom, 1, 2, 1, 2}});
    one.submit();
    CHECK_OK(one.take_all());
}

// Also looks at the block that it is told of.
void check_call(const kvf_completion *completion) {
    if (completion->kind == KVF_COMPLETION_BLOCK)
        reinterpret_cast<const Test *>(completion->user_data)->check_whole(completion->block);
    note_call(completion);
}

// The callback and the queue get the same completions; the callback's last one is the job's, too.
void by_callback(Random &random, const std::shared_ptr<kvf::Engine> &engine) {
    for (const Source source : kSources) {
        Given given{kSmall, source};
        given.callback = check_call;
        given.owns_gaps = source != Source::Both;
        Test test(random, engine, given);
        test.submit();
        CHECK_OK(test.take_all());
        std::vector<kvf_completion> calls;
        for (int i = 0; i < 10'000 && calls.size() <= test.count(); ++i) {
            for (const kvf_completion &call : take_calls()) calls.push_back(call);
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
        CHECK(calls.size() == test.count() + 1);
        std::vector<bool> seen(test.count());
        for (size_t i = 0; i < test.count(); ++i) {
            CHECK(calls[i].kind == KVF_COMPLETION_BLOCK && !seen[calls[i].block]);
            seen[calls[i].block] = true;
        }
        CHECK(calls.back().kind == KVF_COMPLETION_JOB && calls.back().status == KVF_OK);
    }
}

// Takes what comes while later copies are held.
void take_first(Test &test) {
    driver().hold("copy", kHeldCopy, 1);
    test.submit();
    CHECK(driver().wait_held(1, 60'000) == 1);
    CHECK(test.take());
    while (test.take(200 * MILLISECONDS)) {
    }
    CHECK(!test.told().empty() && test.told().size() < test.count());
    CHECK(test.told().back() != kNone && !test.job()->ended(nullptr));
}

// A block is told of, and its buffer is free, while others still move.
void while_others_move(Random &random, const std::shared_ptr<kvf::Engine> &engine) {
    if (!driver().simulated()) return;
    for (const Kind kind : {Kind::Pool, Kind::Registered}) {
        for (const uint32_t priority : {KVF_PRIORITY_BACKGROUND, KVF_PRIORITY_URGENT}) {
            Test test(random, engine, {kLarge, Source::Device, kind, priority, false});
            take_first(test);
            CHECK_STATUS(KVF_ERR_BUSY, kvf_queue_destroy(test.queue()));
            for (uint32_t block = 0; block < test.count(); ++block) {
                if (test.was_told(block)) {
                    test.free(block);
                } else if (kind == Kind::Pool) {
                    CHECK_STATUS(KVF_ERR_BUSY, kvf_buffer_free(test.buffer(block).data()));
                }
            }
            driver().release();
            CHECK_OK(test.take_all());
        }
    }
}

void cancelled(Random &random, const std::shared_ptr<kvf::Engine> &engine) {
    if (!driver().simulated()) return;
    for (const Kind kind : {Kind::Pool, Kind::Pageable}) {
        for (const uint32_t priority : {KVF_PRIORITY_BACKGROUND, KVF_PRIORITY_URGENT}) {
            Test test(random, engine, {kLarge, Source::Device, kind, priority, false});
            take_first(test);
            test.job()->cancel();
            driver().release();
            CHECK_STATUS(KVF_ERR_CANCELLED, test.take_all());
            // The copy that had begun before the cancel does not count.
            CHECK(test.told().size() <= test.count());
        }
    }
}

void failed(Random &random, const std::shared_ptr<kvf::Engine> &engine) {
    if (!driver().simulated()) return;
    for (const char *call : {"cuMemcpyDtoHAsync", "cuEventRecord", "cuLaunchKernel"}) {
        for (const uint64_t nth : {1, 4, 9}) {
            for (const bool owns_gaps : {true, false}) {
                Test test(random, engine,
                          {kLarge, Source::Device, Kind::Pool, KVF_PRIORITY_BACKGROUND, owns_gaps});
                driver().fail(call, nth, CUDA_ERROR_INVALID_VALUE, 0);
                test.submit();
                const int32_t status = test.take_all();
                CHECK(status == KVF_OK || status == KVF_ERR_DEVICE);
                driver().reset();
            }
        }
    }
}

// Nothing is told of a job that follows a stream before it may move.
void follows_a_stream(Random &random, const std::shared_ptr<kvf::Engine> &engine) {
    const Stream stream;
    for (const bool cancels : {true, false}) {
        Barrier barrier;
        barrier.close(stream);
        Given given{kSmall};
        given.stream = stream.number();
        Test test(random, engine, given);
        test.submit();
        CHECK(!test.take(20 * MILLISECONDS));
        if (cancels) {
            test.job()->cancel();
            CHECK_STATUS(KVF_ERR_CANCELLED, test.take_all());
            CHECK(test.told().size() == 1);
            barrier.open();
        } else {
            barrier.open();
            CHECK_OK(test.take_all());
        }
        stream.synchronize();
    }
}

// The submitting call fails after its parts were handed over: nobody hears of any block.
void retracted(Random &random, const std::shared_ptr<kvf::Engine> &engine) {
    for (const Source source : kSources) {
        Test test(random, engine, {kSmall, source, Kind::Pool, KVF_PRIORITY_URGENT, false});
        {
            kvf::OpenJob open(*engine, test.submission(), test.options(), false);
            for (auto &[device, layout] : test.layouts()) open.add(device, std::move(layout));
            CHECK(!test.take(10 * MILLISECONDS));
        }
        CHECK(!test.take(0));
        // Part by part, and committed: blocks are told of from the commit on.
        kvf::OpenJob open(*engine, test.submission(), test.options(), false);
        for (auto &[device, layout] : test.layouts()) open.add(device, std::move(layout));
        CHECK(!test.take(10 * MILLISECONDS));
        open.commit({}, nullptr);
        CHECK_OK(test.take_all());
    }
}

// Where a pump is refused memory, whenever that is, the completions come.
void without_memory(Random &random, const std::shared_ptr<kvf::Engine> &engine) {
    if (!driver().simulated()) return;
    bool all_asked = false;
    for (int64_t nth = 1; !all_asked; ++nth) {
        CHECK(nth < 2000);
        Given given{kSmall, Source::Device, Kind::Pageable};
        given.callback = note_call;
        Test test(random, engine, given);
        asked = 0;
        refused = nth;
        test.submit();
        const int32_t status = test.take_all();
        all_asked = asked < nth;
        refused = 0;
        CHECK(status == KVF_OK || status == KVF_ERR_OUT_OF_MEMORY);
    }
    take_calls();
}

// Where the submitting call is refused memory, whenever that is, there is no job: nobody is told,
// and no place in the queue stays reserved.
void call_without_memory(Random &random, const std::shared_ptr<kvf::Engine> &engine) {
    char name[16] = "";
    prctl(PR_GET_NAME, name);
    bool all_asked = false;
    for (int64_t nth = 1; !all_asked; ++nth) {
        CHECK(nth < 2000);
        Given given{kSmall, Source::Host};
        given.callback = note_call;
        Test test(random, engine, given);
        prctl(PR_SET_NAME, "kvf-save-call"); // so that is_pump() is true here
        asked = 0;
        refused = nth;
        bool submitted = true;
        try {
            test.submit();
        } catch (const std::bad_alloc &) {
            submitted = false;
        }
        all_asked = asked < nth;
        refused = 0;
        prctl(PR_SET_NAME, name);
        if (submitted) {
            // Where the device is refused memory, the job fails.
            const int32_t status = test.take_all();
            CHECK(status == KVF_OK || status == KVF_ERR_SYSTEM);
        } else {
            CHECK(!all_asked && !test.take(0));
        }
    }
    take_calls();
}

// Jobs of several threads, some of which are cancelled at any point.
void races(const std::shared_ptr<kvf::Engine> &engine) {
    std::vector<std::thread> threads;
    for (uint64_t thread = 0; thread < 3; ++thread) {
        threads.emplace_back([&, thread] {
            const Context context;
            Random random(thread);
            for (int round = 0; round < 30; ++round) {
                Given given{kSmall, kSources[random() % 3]};
                given.kind = random() % 2 ? Kind::Pool : Kind::Pageable;
                given.priority = random() % 2 ? KVF_PRIORITY_URGENT : KVF_PRIORITY_BACKGROUND;
                given.callback = random() % 2 ? note_call : nullptr;
                given.owns_gaps = given.source != Source::Both;
                Test test(random, engine, given);
                test.submit();
                if (random() % 2) {
                    for (uint64_t i = random() % 4; i > 0; --i) {
                        if (!test.take(MILLISECONDS) || test.told().back() == kNone) break;
                    }
                    test.job()->cancel();
                }
                const int32_t status = test.take_all();
                CHECK(status == KVF_OK || status == KVF_ERR_CANCELLED);
            }
        });
    }
    for (auto &thread : threads) thread.join();
    take_calls();
}

// A device is lost in the middle: what was told of stays whole.
void device_lost(Random &random) {
    if (!driver().simulated()) return;
    const auto engine = make_cuda_engine(2);
    {
        Test test(random, engine, {kLarge, Source::Device, Kind::Pool, KVF_PRIORITY_URGENT, false});
        take_first(test);
        const std::vector<uint32_t> told = test.told();
        CHECK(driver().lose_device(0, CUDA_ERROR_ILLEGAL_ADDRESS, 0) == 0);
        CHECK_STATUS(KVF_ERR_DEVICE_LOST, test.take_all());
        CHECK(test.told().size() <= test.count());
        for (const uint32_t block : told) test.check_whole(block);
    }
    engine->close();
    caches.clear();
}

} // namespace

int main() {
    Random random(27);
    {
        const Context context;
        const Holdings holdings;
        auto engine = make_cuda_engine(2);
        every_way(random, engine);
        by_callback(random, engine);
        while_others_move(random, engine);
        cancelled(random, engine);
        failed(random, engine);
        follows_a_stream(random, engine);
        retracted(random, engine);
        without_memory(random, engine);
        call_without_memory(random, engine);
        races(engine);
        engine->close();
        engine.reset();
        caches.clear();
        holdings.check_same();
    }
    const Context context;
    device_lost(random);
    return 0;
}
