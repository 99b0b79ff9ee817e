// Loads of blocks ahead that are refused, fail or are cancelled at every point. The cache of a fake
// libllama lies in the memory of the device. However a load ends: exactly one completion if it was
// submitted, and none if not; the sequence is empty, and so are the others; the buffers are free.
#include <utility>

#include "cuda.hpp"
#include "llama/fake_libllama.h"
#include "state_builder.hpp"

namespace {

constexpr int32_t kCells = 128, kBlocks = 4, kCellsOfBlock = kCells / kBlocks;
constexpr uint32_t kRow = 64 * KiB; // 8 MiB in each tensor
constexpr size_t kTensor = size_t{kCells} * kRow;
constexpr size_t kHeader = sizeof(int32_t) + sizeof(uint64_t); // of a tensor: its type and row

fake_llama *fake;

Bytes state_of(int32_t begin, int32_t end) {
    StateBuilder state;
    state.attention(
        {.cells = static_cast<uint32_t>(end - begin), .layers = 1, .row = kRow, .position = begin});
    return state.bytes;
}

// The tensors of a state, one behind the other.
Bytes tensors_of(const Bytes &state) {
    Bytes tensors(state.end() - 2 * kTensor - kHeader, state.end() - kTensor - kHeader);
    tensors.insert(tensors.end(), state.end() - kTensor, state.end());
    return tensors;
}

// A context whose first sequence has kCells cells, which a load of blocks replaces.
class Trial {
public:
    Trial() {
        const size_t end = state_.size();
        fake->state = {state_.data(),
                       end,
                       {{end - 2 * kTensor - kHeader, kTensor}, {end - kTensor, kTensor}},
                       kCells};
        fake->memory = reinterpret_cast<char *>(memory_.address());
        fake->last_position = kCells - 1;
        fake->more_sequences = 2;
        fake->loads_tensors = true;
        CHECK_OK(kvf_llama_attach(engine_, context(), nullptr, &llama_));
        for (int32_t i = 0; i < kBlocks; ++i) {
            kvf_block block = {nullptr, 0, i * kCellsOfBlock, (i + 1) * kCellsOfBlock};
            const Bytes state = state_of(block.begin, block.end);
            block.bytes = state.size();
            CHECK_OK(kvf_buffer_alloc(engine_, block.bytes, &block.buffer));
            std::copy(state.begin(), state.end(), static_cast<unsigned char *>(block.buffer));
            blocks_.push_back(block);
        }
    }
    ~Trial() {
        if (llama_) detach();
        for (const kvf_block &block : blocks_) CHECK_OK(kvf_buffer_free(block.buffer));
        CHECK_OK(kvf_queue_destroy(queue_));
        engine_.destroy();
        fake->on_tensor = nullptr;
        fake->refuses_state = false;
        driver().reset();
    }
    Trial(const Trial &) = delete;
    Trial &operator=(const Trial &) = delete;

    int32_t load(kvf_job *job = nullptr) {
        kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
        options.priority = KVF_PRIORITY_URGENT;
        options.mode = KVF_LOAD_AHEAD;
        options.queue = queue_;
        const uint32_t count = kBlocks;
        return kvf_llama_load_blocks(llama_, 0, blocks_.data(), sizeof(kvf_block), count, nullptr,
                                     0, &options, job);
    }
    void cancel() const { CHECK_OK(kvf_engine_cancel(engine_)); }
    void detach() { CHECK_OK(kvf_llama_detach(std::exchange(llama_, 0))); }
    std::vector<kvf_block> &blocks() { return blocks_; }

    // Each call checks how the load ended.
    void was_not_submitted() {
        while (engine_.describes("\"jobs_in_flight\": 1")) sleep_ms(1);
        sleep_ms(10);
        kvf_completion completion;
        CHECK(kvf_queue_take(queue_, &completion, sizeof completion, 1, 0) == 0);
    }
    kvf_completion has_ended(int32_t status) {
        kvf_completion completion;
        CHECK(kvf_queue_take(queue_, &completion, sizeof completion, 1, 20 * SECONDS) == 1);
        CHECK_STATUS(status, completion.status);
        was_not_submitted(); // once more
        return completion;
    }
    void has_loaded() {
        CHECK(has_ended(KVF_OK).mode == KVF_LOAD_AHEAD);
        CHECK(fake->last_position == kCells - 1);
        others_are_empty();
        CHECK(memory_.read() == tensors_of(state_));
    }
    void is_empty() {
        if (llama_) CHECK(kvf_llama_settle(llama_) >= 0);
        CHECK(fake->last_position == -1);
        others_are_empty();
    }
    void is_unchanged() {
        CHECK(fake->last_position == kCells - 1);
        others_are_empty();
        CHECK(memory_.read() == Bytes(2 * kTensor, 0x77));
    }
    // The next load is as good as the first one would have been.
    void goes_on() {
        fake->on_tensor = nullptr;
        fake->refuses_state = false;
        CHECK_OK(load());
        has_loaded();
    }

private:
    static llama_context *context() {
        static char memory[64] = "";
        return reinterpret_cast<llama_context *>(memory);
    }
    static void others_are_empty() {
        for (const int32_t last : fake->last_of_others) CHECK(last == -1);
    }

    const Bytes state_ = state_of(0, kCells);
    const Context cuda_;
    const DeviceMemory memory_{Bytes(2 * kTensor, 0x77)};
    Engine engine_;
    const kvf_queue queue_ = make_queue();
    kvf_llama llama_ = 0;
    std::vector<kvf_block> blocks_;
};

Trial *trial; // that the hooks of the fake act on

void without_trouble() {
    Trial one;
    CHECK_OK(one.load());
    one.has_loaded();
    // There are pieces between which something can happen.
    CHECK(driver().count("copies_load") >= 3);
}

// Before libllama is called.
void what_is_refused_at_once() {
    Trial one;
    auto *const first = static_cast<unsigned char *>(one.blocks()[0].buffer);
    ++first[0];
    CHECK_STATUS(KVF_ERR_STATE_DAMAGED, one.load());
    one.was_not_submitted();
    one.is_unchanged();
    --first[0];
    ++one.blocks()[1].begin;
    CHECK_STATUS(KVF_ERR_INVALID_ARGUMENT, one.load());
    one.was_not_submitted();
    one.is_unchanged();
    --one.blocks()[1].begin;
    one.goes_on();
}

// ---- While libllama takes cells -----------------------------------------------------------------

// Before libllama names the first tensor, the second one, and when it has named both. The first
// piece has been held until then, so that all others are still to come.
constexpr int kNumbers[] = {0, 1, 2};
int wanted; // one of them

// Calls `happen` at the wanted number, while a piece is under way.
template <void (*happen)()>
void at_the_wanted(int number) {
    if (number != wanted) return;
    CHECK(driver().wait_held(1, 10'000) == 1);
    happen();
    driver().release();
}

void refuse() { fake->refuses_state = true; }
void cancel() { trial->cancel(); }
void fail_a_copy() { driver().fail("copy", 1, CUDA_ERROR_ILLEGAL_ADDRESS, 0); }
// What is staged cannot be copied to its place.
void fail_to_place() {
    for (const char *call : {"cuMemcpyDtoDAsync", "cuLaunchKernel"})
        driver().fail(call, 1, CUDA_ERROR_INVALID_VALUE, 1);
}

void libllama_refuses() {
    for (const int number : kNumbers) {
        Trial one;
        wanted = number;
        fake->on_tensor = &at_the_wanted<refuse>;
        driver().hold("copy", 1, 0);
        CHECK_STATUS(KVF_ERR_CACHE_FULL, one.load());
        one.was_not_submitted();
        one.is_empty();
        one.goes_on();
    }
}

void it_is_cancelled_during_the_call() {
    for (const int number : kNumbers) {
        Trial one;
        trial = &one;
        wanted = number;
        fake->on_tensor = &at_the_wanted<cancel>;
        driver().hold("copy", 1, 0);
        CHECK_OK(one.load());
        one.has_ended(KVF_ERR_CANCELLED);
        one.is_empty();
        one.goes_on();
    }
}

void the_device_is_lost_during_the_call() {
    for (const int number : kNumbers) {
        Trial one;
        wanted = number;
        fake->on_tensor = &at_the_wanted<fail_a_copy>;
        driver().hold("copy", 1, 0);
        const int32_t status = one.load();
        if (status == KVF_OK) {
            one.has_ended(KVF_ERR_DEVICE_LOST);
        } else {
            CHECK_STATUS(KVF_ERR_DEVICE_LOST, status);
            one.was_not_submitted();
        }
        one.is_empty();
    }
}

void nothing_can_be_placed() {
    for (const int number : kNumbers) {
        Trial one;
        wanted = number;
        fake->on_tensor = &at_the_wanted<fail_to_place>;
        driver().hold("copy", 1, 0);
        CHECK_OK(one.load());
        one.has_ended(KVF_ERR_DEVICE);
        one.is_empty();
        driver().reset();
        one.goes_on();
    }
}

// ---- After the call -----------------------------------------------------------------------------

// A load whose second piece is held: the others are behind that piece, and the call has returned.
kvf_job load_and_hold(Trial &one) {
    driver().hold("copy", 2, 0);
    kvf_job job = 0;
    CHECK_OK(one.load(&job));
    CHECK(driver().wait_held(1, 10'000) == 1);
    for (const kvf_block &block : one.blocks())
        CHECK_STATUS(KVF_ERR_BUSY, kvf_buffer_free(block.buffer));
    CHECK_STATUS(KVF_ERR_BUSY, one.load());
    return job;
}

void it_is_cancelled_between_pieces() {
    for (const bool is_released : {false, true}) {
        Trial one;
        const kvf_job job = load_and_hold(one);
        if (is_released) {
            CHECK_OK(kvf_job_release(job));
            one.cancel();
        } else {
            CHECK_OK(kvf_job_cancel(job));
        }
        driver().release();
        one.has_ended(KVF_ERR_CANCELLED);
        if (!is_released) CHECK_OK(kvf_job_release(job));
        one.is_empty();
        one.goes_on();
    }
}

void the_device_is_lost_between_pieces() {
    Trial one;
    const kvf_job job = load_and_hold(one);
    fail_a_copy();
    driver().release();
    one.has_ended(KVF_ERR_DEVICE_LOST);
    CHECK_OK(kvf_job_release(job));
    one.is_empty();
}

void the_next_piece_cannot_be_submitted() {
    Trial one;
    driver().fail("cuMemcpyHtoDAsync", 2, CUDA_ERROR_INVALID_VALUE, 0);
    CHECK_OK(one.load());
    one.has_ended(KVF_ERR_DEVICE);
    one.is_empty();
    driver().reset();
    one.goes_on();
}

// The handle goes while the load is in flight, which ends well.
void its_handle_is_released() {
    Trial one;
    CHECK_OK(kvf_job_release(load_and_hold(one)));
    driver().release();
    one.has_loaded();
}

// kvf_llama_detach() waits for the load, and empties a sequence whose load was cancelled.
void the_attachment_is_detached() {
    for (const bool is_cancelled : {false, true}) {
        Trial one;
        const kvf_job job = load_and_hold(one);
        if (is_cancelled) CHECK_OK(kvf_job_cancel(job));
        std::thread later([] {
            sleep_ms(50);
            driver().release();
        });
        one.detach();
        later.join();
        if (is_cancelled) {
            one.has_ended(KVF_ERR_CANCELLED);
            one.is_empty();
        } else {
            one.has_loaded();
        }
        CHECK_OK(kvf_job_release(job));
    }
}

} // namespace

int main(int count, char **arguments) {
    CHECK(count == 2);
    need_simulation();
    setenv("KVFERRY_STUCK_SECONDS", "20", 1);
    void *const library = dlopen(arguments[1], RTLD_NOW);
    CHECK(library);
    fake = static_cast<fake_llama *>(dlsym(library, "fake_llama"));
    const Holdings holdings;
    without_trouble();
    what_is_refused_at_once();
    libllama_refuses();
    it_is_cancelled_during_the_call();
    the_device_is_lost_during_the_call();
    nothing_can_be_placed();
    it_is_cancelled_between_pieces();
    the_device_is_lost_between_pieces();
    the_next_piece_cannot_be_submitted();
    its_handle_is_released();
    the_attachment_is_detached();
    holdings.check_same();
}
