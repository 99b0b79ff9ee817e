// What no real libllama can be made to do, with one that does it.
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstring>
#include <ctime>
#include <thread>

#include "check.hpp"
#include "fake_libllama.h"
#include "kvferry.h"
#include "state_builder.hpp"

namespace {

fake_llama *fake;
llama_context *context;
kvf_engine engine;

kvf_engine host_engine() {
    kvf_engine_options options = KVF_ENGINE_OPTIONS_INIT;
    options.devices = KVF_DEVICES_HOST;
    kvf_engine made = 0;
    CHECK(kvf_engine_create(&options, &made) == KVF_OK);
    return made;
}

void a_context_that_shares_cells_is_refused_by_the_right_words() {
    fake->shares_cells = true;
    char error[256] = "";
    kvf_llama_options options = KVF_LLAMA_OPTIONS_INIT;
    options.error = error;
    options.error_size = sizeof error;
    for (const int32_t last : {-1, 20}) {
        fake->last_position = last;
        kvf_llama llama = 0;
        CHECK(kvf_llama_attach(engine, context, &options, &llama) == KVF_ERR_UNSUPPORTED);
        CHECK(std::strstr(error, "uses the cells of another context"));
    }
    fake->shares_cells = false;
    fake->last_position = -1;
}

// The first state with cells is tried with one cell. Here libllama takes it, and there is no memory
// to see what it writes then.
void the_cell_of_a_trial_that_fails_does_not_stay() {
    kvf_llama llama = 0;
    CHECK(kvf_llama_attach(engine, context, nullptr, &llama) == KVF_OK);
    StateBuilder state;
    state.attention({});
    fake->claimed_bytes = uint64_t{1} << 60;
    CHECK(kvf_llama_load(llama, 0, state.bytes.data(), state.bytes.size(), nullptr, nullptr) ==
          KVF_ERR_OUT_OF_MEMORY);
    CHECK(fake->last_position == -1);
    fake->claimed_bytes = 0;
    CHECK(kvf_llama_detach(llama) == KVF_OK);
}

// ---- A load that libllama refuses ---------------------------------------------------------------

uint32_t removals;
bool removed_during_job;

bool has_job_in_flight() {
    char text[4096];
    CHECK(kvf_engine_describe(engine, text, sizeof text, nullptr) == KVF_OK);
    return !std::strstr(text, "\"jobs_in_flight\": 0");
}

// The engine counts a job until a moment after its end.
void on_removal() {
    ++removals;
    for (int i = 0; i < 100 && has_job_in_flight(); ++i) {
        constexpr timespec hundredth{0, 10'000'000};
        nanosleep(&hundredth, nullptr);
    }
    removed_during_job |= has_job_in_flight();
}

// The first part moves while libllama still takes cells. Then libllama refuses the state: no byte
// may move any more when the cells are removed, for they may be another sequence's from then on.
void a_refused_load_is_withdrawn_before_its_cells_are_removed() {
    constexpr uint32_t cells = 128, row = 64 << 10; // 8 MiB in each tensor
    StateBuilder state;
    state.attention({.cells = cells, .layers = 1, .row = row});
    constexpr size_t tensor = size_t{cells} * row;
    constexpr size_t header = sizeof(int32_t) + sizeof(uint64_t);
    const size_t end = state.bytes.size();
    fake->state = {state.bytes.data(),
                   end,
                   {{end - 2 * tensor - header, tensor}, {end - tensor, tensor}},
                   cells};
    fake->last_position = cells - 1;
    kvf_llama llama = 0;
    CHECK(kvf_llama_attach(engine, context, nullptr, &llama) == KVF_OK);

    const std::vector<unsigned char> given = state.bytes;
    kvf_block block = {const_cast<unsigned char *>(given.data()), given.size(), 0, cells};
    fake->loads_tensors = true;
    fake->on_tensor = [](int number) { fake->refuses_state = number == 2; };
    fake->on_removal = &on_removal;
    for (const bool as_block : {false, true}) {
        removals = 0;
        kvf_job job = 0;
        const int32_t status =
            as_block ? kvf_llama_load_blocks(llama, 0, &block, sizeof block, 1, nullptr, 0, nullptr,
                                             &job)
                     : kvf_llama_load(llama, 0, given.data(), given.size(), nullptr, &job);
        CHECK(status == KVF_ERR_CACHE_FULL);
        CHECK(job == 0);
        CHECK(removals > 0 && !removed_during_job);
        CHECK(fake->last_position == -1);
    }
    fake->on_removal = nullptr;
    fake->loads_tensors = fake->refuses_state = false;
    fake->on_tensor = nullptr;
    CHECK(kvf_llama_detach(llama) == KVF_OK);
    fake->state = {};
}

// ---- The array of blocks ------------------------------------------------------------------------

kvf_block *array; // in a page of its own
std::atomic<bool> ended, written_late;

void on_completion(const kvf_completion *) { ended = true; }

// The call has begun to write the sizes. If the job had been submitted already, it ends now.
void on_write(int, siginfo_t *, void *) {
    for (int i = 0; i < 30 && !ended; ++i) {
        constexpr timespec hundredth{0, 10'000'000};
        nanosleep(&hundredth, nullptr);
    }
    written_late = ended.load();
    mprotect(array, static_cast<size_t>(sysconf(_SC_PAGESIZE)), PROT_READ | PROT_WRITE);
}

// Whoever gets the completion may read the sizes, or free the array.
void the_sizes_of_blocks_are_written_before_the_job_can_end() {
    StateBuilder state;
    state.attention({.cells = 3, .layers = 1, .row = 32});
    constexpr size_t tensor = size_t{3} * 32;
    constexpr size_t header = sizeof(int32_t) + sizeof(uint64_t); // of a tensor: its type and row
    const size_t end = state.bytes.size();
    fake->state = {
        state.bytes.data(), end, {{end - 2 * tensor - header, tensor}, {end - tensor, tensor}}, 3};
    fake->last_position = 2;

    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void *const mapped =
        mmap(nullptr, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(mapped != MAP_FAILED);
    array = static_cast<kvf_block *>(mapped);
    unsigned char room[512];
    *array = {room, sizeof room, 0, 3};
    struct sigaction action = {}, before = {};
    action.sa_sigaction = &on_write;
    action.sa_flags = SA_SIGINFO;
    CHECK(sigaction(SIGSEGV, &action, &before) == 0);
    CHECK(mprotect(array, page, PROT_READ) == 0);

    kvf_llama llama = 0;
    CHECK(kvf_llama_attach(engine, context, nullptr, &llama) == KVF_OK);
    kvf_submit_options options = KVF_SUBMIT_OPTIONS_INIT;
    options.callback = &on_completion;
    kvf_job job = 0;
    CHECK(kvf_llama_save_blocks(llama, 0, array, sizeof *array, 1, &options, &job) == KVF_OK);
    CHECK(kvf_job_wait(job, -1, nullptr, 0) == KVF_OK);
    while (!ended) std::this_thread::yield();
    CHECK(!written_late);
    CHECK(array->bytes == end);
    CHECK(std::memcmp(room, state.bytes.data(), end) == 0);

    CHECK(kvf_job_release(job) == KVF_OK);
    CHECK(kvf_llama_detach(llama) == KVF_OK);
    CHECK(sigaction(SIGSEGV, &before, nullptr) == 0);
    CHECK(munmap(mapped, page) == 0);
    fake->state = {};
    fake->last_position = -1;
}

} // namespace

int main(int count, char **arguments) {
    CHECK(count == 2);
    void *const library = dlopen(arguments[1], RTLD_NOW);
    CHECK(library);
    fake = static_cast<fake_llama *>(dlsym(library, "fake_llama"));
    char memory[64] = "";
    context = reinterpret_cast<llama_context *>(memory);
    engine = host_engine();
    a_context_that_shares_cells_is_refused_by_the_right_words();
    the_cell_of_a_trial_that_fails_does_not_stay();
    a_refused_load_is_withdrawn_before_its_cells_are_removed();
    the_sizes_of_blocks_are_written_before_the_job_can_end();
    CHECK(kvf_engine_destroy(engine) == KVF_OK);
}
