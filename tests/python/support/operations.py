"""Operations on a context, each of which is done in two contexts and returns what to compare."""

from __future__ import annotations

import ctypes

from support.llama_reference import llama
from support.sides import OTHER, OWN, SPARE, Operation, Side

# ---- What llama.cpp postpones to its next decode -------------------------------------------------


def pending_shift(seq: int) -> Operation:
    def postpone(side: Side) -> None:
        assert side.context.seq_rm(seq, 0, 4)
        side.context.seq_add(seq, 4, -1, -4)

    return postpone


def pending_copy(source: int, target: int) -> Operation:
    """Copies between streams at the next decode. (In a unified cache, at once.)"""

    def postpone(side: Side) -> None:
        side.context.seq_cp(source, target)

    return postpone


def decode_one(side: Side, seq: int) -> bytes:
    """Decodes one token; returns the logits after it."""
    return side.context.decode(seq, [9]).tobytes()


def decode_many(side: Side, seq: int, tokens: int) -> bytes:
    return side.context.decode(seq, side.context.model.prompt(tokens, seed=5)).tobytes()


def decode_fourth(side: Side) -> bytes:
    return decode_one(side, 3)


# ---- Operations ----------------------------------------------------------------------------------


def decode(side: Side) -> bytes:
    """Decodes OTHER so far that it uses cells that have left a sliding window."""
    side.context.seq_rm(SPARE)
    return decode_many(side, OTHER, 20)


def decode_several(side: Side) -> bytes:
    """Decodes OTHER and SPARE at once. llama.cpp moves the recurrent cell of OWN for them."""
    logits = side.context.decode_in_turn([SPARE, OTHER], 10, seed=6)
    return logits[SPARE].tobytes() + logits[OTHER].tobytes()


def decode_own(side: Side) -> bytes:
    return decode_many(side, OWN, 10)


def shift(side: Side) -> bytes:
    """Shifts OTHER; the decode applies it."""
    pending_shift(OTHER)(side)
    return decode_one(side, OTHER)


def shift_own(side: Side) -> bytes:
    pending_shift(OWN)(side)
    return decode_one(side, OTHER)


def divide(side: Side) -> bytes:
    _divide_positions(side, OTHER)
    return decode_one(side, SPARE)


def divide_own(side: Side) -> bytes:
    _divide_positions(side, OWN)
    return decode_one(side, OTHER)


def _divide_positions(side: Side, seq: int) -> None:
    llama.llama_memory_seq_div(side.context.memory, seq, 20, -1, 2)


def copy(side: Side) -> bytes:
    """Copies OTHER onto SPARE. Between streams the decode applies it."""
    pending_copy(OTHER, SPARE)(side)
    return decode_one(side, SPARE)


def copy_own(side: Side) -> bytes:
    pending_copy(OWN, SPARE)(side)
    return decode_one(side, OTHER)


def copy_onto_own(side: Side) -> bytes:
    pending_copy(OTHER, OWN)(side)
    return decode_one(side, SPARE)


def remove(side: Side) -> bytes:
    side.context.seq_rm(OTHER)
    return decode_many(side, SPARE, 100)


def remove_a_part(side: Side) -> bytes:
    assert side.context.seq_rm(OTHER, 30, -1)
    return decode_many(side, OTHER, 30)


def remove_own(side: Side) -> bytes:
    side.context.seq_rm(OWN)
    return decode_many(side, OTHER, 20)


def remove_within_own(side: Side) -> bytes:
    assert side.context.seq_rm(OWN, 10, 20)
    return decode_many(side, OTHER, 20)


def decode_own_anew(side: Side) -> bytes:
    """As many tokens as before: the first and the last position tell nothing."""
    side.context.seq_rm(OWN)
    return decode_many(side, OWN, 40)


def decode_another_end_of_own(side: Side) -> bytes:
    """A longer one than before, as if tokens had only been appended."""
    assert side.context.seq_rm(OWN, 20, -1)
    return decode_many(side, OWN, 30)


def remove_by_kvferry(side: Side) -> bytes:
    side.remove(OTHER)
    return decode_one(side, SPARE)


def remove_own_by_kvferry(side: Side) -> None:
    side.remove(OWN)


def keep_own(side: Side) -> bytes:
    side.context.seq_keep(OWN)
    return decode_many(side, OTHER, 100)


def keep_other(side: Side) -> bytes:
    side.context.seq_keep(OTHER)
    return decode_many(side, OTHER, 20)


def clear(side: Side) -> bytes:
    side.context.clear()
    return decode_many(side, OTHER, 20)


def state_get(side: Side) -> bytes:
    return side.context.state_get(OTHER)


def state_get_own(side: Side) -> bytes:
    return side.context.state_get(OWN)


def state_get_all(side: Side) -> bytes:
    context = side.context
    buffer = (ctypes.c_uint8 * llama.llama_state_get_size(context.pointer))()
    written = llama.llama_state_get_data(context.pointer, buffer, len(buffer))
    return bytes(buffer[:written])


def state_set(side: Side) -> bytes:
    context = side.context
    state = context.state_get(OTHER)
    context.seq_rm(SPARE)
    assert context.state_set(SPARE, state) == len(state)
    return context.state_get(SPARE)


def state_set_own(side: Side) -> None:
    context = side.context
    state = context.state_get(OTHER)
    assert context.state_set(OWN, state) == len(state)


def save(side: Side) -> bytes:
    return side.save(OTHER)


def save_own(side: Side) -> bytes:
    return side.save(OWN)


def load(side: Side) -> bytes:
    state = side.save(OTHER)
    side.context.seq_rm(SPARE)
    side.load(SPARE, state)
    return state


def load_within_own(side: Side) -> bytes:
    """SPARE gets cells that OWN has lost."""
    state = side.save(OTHER)
    side.context.seq_rm(SPARE)
    assert side.context.seq_rm(OWN, 1, 39)
    side.load(SPARE, state)
    return side.context.state_get(SPARE)


def load_own(side: Side) -> None:
    side.load(OWN, side.context.state_get(OTHER))


OPERATIONS: dict[str, list[Operation]] = {
    "llama_decode of other sequences": [decode, decode_several],
    "llama_decode of this one": [decode_own],
    "llama_memory_seq_add, _div of another": [shift, divide],
    "llama_memory_seq_add, _div of this one": [shift_own, divide_own],
    "llama_memory_seq_cp between others": [copy],
    "llama_memory_seq_cp of this one onto another": [copy_own],
    "llama_memory_seq_cp onto this one": [copy_onto_own],
    "llama_memory_seq_rm of another": [remove, remove_a_part],
    "llama_memory_seq_rm of this one": [remove_own],
    "llama_memory_seq_keep of this one": [keep_own],
    "llama_memory_seq_keep of another": [keep_other],
    "llama_memory_clear": [clear],
    "llama_state_seq_get_data of another": [state_get],
    "llama_state_seq_get_data of this one": [state_get_own],
    "llama_state_get_data": [state_get_all],
    "llama_state_seq_set_data into another": [state_set],
    "llama_state_seq_set_data into this one": [state_set_own],
    "kvf_llama_load of another": [load],
    "kvf_llama_save, _remove of another": [save, remove_by_kvferry],
    "kvf_llama_save of this one": [save_own],
    "kvf_llama_load, _remove of this one": [load_own, remove_own_by_kvferry],
}
"""The operations of each row of the table in kvferry.h."""
