// Several threads record, and others call libllama, while attachments come and go: every recorded
// call is counted, and each call does what its thread wants of it. Above all for ThreadSanitizer.
#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "fake_libllama.h"
#include "kvferry.h"
#include "state_builder.hpp"

namespace {

constexpr int kRecording = 3, kSaves = 500, kAttachments = 100;
constexpr size_t kTensors = 2;

using GetData = size_t (*)(void *, uint8_t *, size_t, int32_t, uint32_t);

fake_llama *fake;
GetData get_data;
kvf_engine engine;

char contexts[kRecording + 1][64];

kvf_llama attach(int which) {
    kvf_llama llama = 0;
    auto *const context = reinterpret_cast<llama_context *>(contexts[which]);
    CHECK(kvf_llama_attach(engine, context, nullptr, &llama) == KVF_OK);
    return llama;
}

uint64_t number(kvf_llama llama, const char *key) {
    char text[4096];
    CHECK(kvf_llama_describe(llama, text, sizeof text, nullptr) == KVF_OK);
    const char *const found = std::strstr(text, key);
    CHECK(found);
    return std::strtoull(found + std::strlen(key), nullptr, 10);
}

uint64_t recorded(kvf_llama llama) { return number(llama, "\"recorded_calls\": "); }

void save_often(kvf_llama llama, const StateBuilder &state) {
    std::vector<unsigned char> buffer(state.bytes.size());
    for (int i = 0; i < kSaves; ++i) {
        kvf_job job = 0;
        CHECK(kvf_llama_save(llama, 0, buffer.data(), buffer.size(), nullptr, &job) == KVF_OK);
        CHECK(kvf_job_wait(job, KVF_FOREVER, nullptr, 0) == KVF_OK);
        CHECK(kvf_job_release(job) == KVF_OK);
        CHECK(buffer == state.bytes);
        std::fill(buffer.begin(), buffer.end(), 0);
    }
}

// A program's own call of libllama copies, whatever other threads record.
void copy_often(const std::atomic<bool> &over, const StateBuilder &state) {
    std::vector<unsigned char> buffer(state.bytes.size());
    while (!over) {
        CHECK(get_data(contexts[0], buffer.data(), buffer.size(), 0, 0) == buffer.size());
        CHECK(buffer == state.bytes);
        std::fill(buffer.begin(), buffer.end(), 0);
    }
}

// While other attachments stand, so that the slots stay as they are.
void every_call_is_counted(const StateBuilder &state) {
    const kvf_llama first = attach(0);
    const uint64_t before_attaching = recorded(first);
    CHECK(kvf_llama_detach(attach(kRecording)) == KVF_OK);
    const uint64_t of_an_attachment = recorded(first) - before_attaching;

    std::vector<kvf_llama> llamas{first};
    for (int i = 1; i < kRecording; ++i) llamas.push_back(attach(i));
    const uint64_t before = recorded(first);
    std::atomic<bool> over = false;
    std::vector<std::thread> saving;
    for (const kvf_llama llama : llamas)
        saving.emplace_back([&, llama] { save_often(llama, state); });
    std::thread copying([&] { copy_often(over, state); });
    std::thread attaching([&] {
        for (int i = 0; i < kAttachments; ++i) {
            const kvf_llama other = attach(kRecording);
            CHECK(recorded(other) >= before);
            CHECK(kvf_llama_detach(other) == KVF_OK);
        }
    });
    for (std::thread &thread : saving) thread.join();
    attaching.join();
    over = true;
    copying.join();
    CHECK(recorded(first) ==
          before + kRecording * kSaves * kTensors + kAttachments * of_an_attachment);
    for (const kvf_llama llama : llamas) CHECK(kvf_llama_detach(llama) == KVF_OK);
}

// The last attachment restores the slots while other threads are inside our functions.
void slots_are_restored_under_calls(const StateBuilder &state) {
    std::atomic<bool> over = false;
    std::thread copying([&] { copy_often(over, state); });
    for (int i = 0; i < kAttachments; ++i) CHECK(kvf_llama_detach(attach(0)) == KVF_OK);
    over = true;
    copying.join();
}

} // namespace

int main(int count, char **arguments) {
    CHECK(count == 2);
    void *const library = dlopen(arguments[1], RTLD_NOW);
    CHECK(library);
    fake = static_cast<fake_llama *>(dlsym(library, "fake_llama"));
    get_data = reinterpret_cast<GetData>(dlsym(library, "llama_state_seq_get_data_ext"));
    StateBuilder state;
    state.attention({.cells = 3, .layers = 1, .row = 32});
    constexpr size_t tensor = size_t{3} * 32;
    constexpr size_t header = sizeof(int32_t) + sizeof(uint64_t); // of a tensor: its type and row
    const size_t end = state.bytes.size();
    fake->state = {
        state.bytes.data(), end, {{end - 2 * tensor - header, tensor}, {end - tensor, tensor}}};
    fake->last_position = 2;
    kvf_engine_options options = KVF_ENGINE_OPTIONS_INIT;
    options.devices = KVF_DEVICES_HOST;
    CHECK(kvf_engine_create(&options, &engine) == KVF_OK);
    every_call_is_counted(state);
    slots_are_restored_under_calls(state);
    CHECK(kvf_engine_destroy(engine) == KVF_OK);
}
