// The tap: watches libllama while it serialises a sequence, and so learns where the tensor bytes
// are.
//
// libllama moves tensor bytes only through ggml_backend_tensor_get and _set, which it calls through
// relocation slots of its own. The tap puts the library's functions into these slots. On a thread
// that is recording they note (address, bytes, place in the state) instead of copying; on any other
// thread they do what was there before: ggml's function, or somebody else's on the way to it. No
// struct of ggml or llama is read: the address comes from ggml_get_data(). recorder.h says what is
// noted, relocation.h how slots are found, waiting.h what waits for transfers.
//
// Other calls are watched too:
// - operator new and delete of much memory, while a thread records (heap_cache.h);
// - ggml_abort, so that a failed assertion of libllama's while a thread records becomes an
//   exception, which libllama's own handlers turn into an error, and not the end of the process;
// - ggml_backend_buffer_free, so that a cache is not freed under a transfer;
// - ggml_backend_sched_graph_compute_async and what copies or clears tensors, so that whatever
//   rewrites memory of a transfer in flight waits for it (waiting.h).
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

#include "llama/api.h"

namespace kvf {

// One user's share in the tap of one libllama. The slots are restored when the last share goes.
class Tap {
public:
    // Told before libllama frees a buffer of tensors. Must not call into the tap.
    using BufferFreed = std::function<void(uint64_t begin, uint64_t bytes)>;

    // Throws KVF_ERR_TAP if libllama has no slots that could be replaced.
    Tap(const LlamaApi &llama, BufferFreed buffer_freed);
    ~Tap();
    Tap(const Tap &) = delete;
    Tap &operator=(const Tap &) = delete;

    // Writes our functions again into slots that the loader has bound since. (It looks a function
    // up at its first call, and may write the slot after us, where a thread was on its way
    // meanwhile.) Call before a recording. Throws KVF_ERR_TAP.
    void renew_slots();

    struct Counters {
        uint64_t recorded, passed_through; // calls
    };
    Counters counters() const;
    // The counter of recorded calls, which outlives the tap. A recorder adds the sum of a
    // recording: a locked addition for each of half a million calls would take longer than to
    // record them.
    std::atomic<uint64_t> &recorded_calls();

private:
    struct Library;
    friend struct TapHooks;
    Library *library_;
    uint64_t observer_;
};

} // namespace kvf
