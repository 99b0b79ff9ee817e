// The bookkeeping of a context's transfers: their ends are noted even where there is no memory
// left.
#include "llama/sequences.h"

#include <new>

#include "check.hpp"
#include "core/status.h"

using kvf::Direction;
using kvf::LlamaSequences;

namespace {

bool no_memory = false;

bool is_busy(const LlamaSequences &sequences, int32_t sequence, LlamaSequences::Busy busy) {
    try {
        sequences.check_idle(sequence, busy);
        return false;
    } catch (const kvf::Error &error) {
        CHECK(error.status == KVF_ERR_BUSY);
        return true;
    }
}

void a_failed_load_is_noted_without_memory() {
    LlamaSequences sequences(nullptr);
    const LlamaSequences::Transfer load{3, Direction::Load, false};
    sequences.begin(load);
    CHECK(is_busy(sequences, 3, LlamaSequences::Busy::WithLoads));
    CHECK(sequences.take_to_be_emptied().empty()); // not yet
    no_memory = true;
    sequences.end(load, KVF_ERR_CANCELLED);
    no_memory = false;
    CHECK(!is_busy(sequences, 3, LlamaSequences::Busy::WithAny));
    CHECK(sequences.take_to_be_emptied() == std::set<int32_t>{3});
    CHECK(sequences.take_to_be_emptied().empty()); // once
}

// What has failed is still to be emptied, whatever the next transfer does.
void a_failed_load_is_noted_beside_another_transfer() {
    LlamaSequences sequences(nullptr);
    const LlamaSequences::Transfer load{1, Direction::Load, false}, save{1, Direction::Save, false};
    sequences.begin(load);
    sequences.end(load, KVF_ERR_DEVICE);
    sequences.begin(save);
    sequences.end(save, KVF_OK);
    CHECK(sequences.take_to_be_emptied() == std::set<int32_t>{1});
}

void a_forgotten_sequence_is_not_emptied() {
    LlamaSequences sequences(nullptr);
    const LlamaSequences::Transfer load{1, Direction::Load, false},
        other{2, Direction::Load, false};
    for (const auto &transfer : {load, other}) {
        sequences.begin(transfer);
        sequences.end(transfer, KVF_ERR_DEVICE);
    }
    sequences.forget(1);
    sequences.forget(7); // nothing is known of it
    CHECK(sequences.take_to_be_emptied() == std::set<int32_t>{2});
}

void a_transfer_that_ended_well_leaves_nothing() {
    LlamaSequences sequences(nullptr);
    for (const auto direction : {Direction::Load, Direction::Save}) {
        const LlamaSequences::Transfer transfer{5, direction, false};
        sequences.begin(transfer);
        CHECK(is_busy(sequences, 5, LlamaSequences::Busy::WithAny));
        sequences.end(transfer, KVF_OK);
        CHECK(!is_busy(sequences, 5, LlamaSequences::Busy::WithAny));
    }
    const LlamaSequences::Transfer save{5, Direction::Save, false};
    sequences.begin(save);
    sequences.end(save, KVF_ERR_CANCELLED);
    CHECK(sequences.take_to_be_emptied().empty());
}

} // namespace

void *operator new(size_t bytes) {
    void *const memory = no_memory ? nullptr : std::malloc(bytes);
    if (!memory) throw std::bad_alloc();
    return memory;
}
void operator delete(void *memory) noexcept { std::free(memory); }
void operator delete(void *memory, size_t) noexcept { std::free(memory); }

int main() {
    a_failed_load_is_noted_without_memory();
    a_failed_load_is_noted_beside_another_transfer();
    a_forgotten_sequence_is_not_emptied();
    a_transfer_that_ended_well_leaves_nothing();
    return 0;
}
