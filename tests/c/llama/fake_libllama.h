/* What a test tells the fake libllama, by the symbol `fake_llama` of the library. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A state with cells, as the fake writes it: `tensors` by ggml_backend_tensor_get(). */
struct fake_state {
    const unsigned char *data;
    size_t bytes;
    struct fake_tensor {
        size_t offset, bytes;
    } tensors[2];
};

struct fake_llama {
    bool shares_cells;      /* the context has no cells of its own, so that its states are empty */
    int32_t last_position;  /* of its only sequence; -1: the sequence is empty */
    uint64_t claimed_bytes; /* the size of a state with cells, as far as it says; 0: the true one */
    struct fake_state
        state;           /* while `last_position` is not -1; of 0 bytes: a state without cells */
    bool refuses_states; /* after it has named their tensors */
    void (*on_removal)(void); /* called before the cells of the sequence are removed; or NULL */
};
