// What no real libllama can be made to do, with one that does it.
#include <dlfcn.h>

#include <cstring>

#include "check.hpp"
#include "fake_libllama.h"
#include "kvferry.h"
#include "state_writer.hpp"

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
    StateWriter state;
    state.attention({});
    fake->claimed_bytes = uint64_t{1} << 60;
    CHECK(kvf_llama_load(llama, 0, state.bytes.data(), state.bytes.size(), nullptr, nullptr) ==
          KVF_ERR_OUT_OF_MEMORY);
    CHECK(fake->last_position == -1);
    fake->claimed_bytes = 0;
    CHECK(kvf_llama_detach(llama) == KVF_OK);
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
    CHECK(kvf_engine_destroy(engine) == KVF_OK);
}
