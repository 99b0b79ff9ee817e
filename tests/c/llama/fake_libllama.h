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
    uint32_t cells; /* of a load that names tensors: the sequence then has so many positions */
};

struct fake_llama {
    bool shares_cells;      /* the context has no cells of its own, so that its states are empty */
    int32_t last_position;  /* of its only sequence; -1: the sequence is empty */
    uint64_t claimed_bytes; /* the size of a state with cells, as far as it says; 0: the true one */
    struct fake_state
        state; /* while `last_position` is not -1; of 0 bytes: a state without cells */
    /* A load names the tensors of `state`, one after the other; else it takes whatever it is given
     * and names none. */
    bool loads_tensors;
    /* Called in such a load before the tensor of this number is named, and with 2 at the end; or
     * NULL. */
    void (*on_tensor)(int number);
    bool refuses_state; /* from then on, a load that names tensors does not go on, and fails */
    char *memory;       /* of the tensors, one behind the other; NULL: they lie in the state */
    /* Sequences beside the first one, and their last positions. */
    uint32_t more_sequences;
    int32_t last_of_others[3];
    void (*on_removal)(void); /* called before the cells of the sequence are removed; or NULL */
};
