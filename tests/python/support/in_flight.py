"""Operations on a context while a transfer of kvferry is held in flight.

There are two contexts with the same history. In `ours` a transfer is held (holds.py), so that only
those of its bytes move that the submitting call moves itself. In `like` llama.cpp's own call does
at once what the transfer will do. Then the same operation is done in both. The transfer is released
after the operation, or before if the operation waits for the transfer. In the end no byte of any
sequence and no logits may differ.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

from support import c_interface
from support.holds import ByStream, ByUrgentCopies, released_after, wait_until
from support.llama_reference import UNFRAMED, AbortCallback, Context, llama
from support.simulated_cuda import SimulatedCuda

OWN, SPARE, OTHER = 0, 1, 2
"""The sequence that is moved, one that operations may remove, and one that they use."""

SEQUENCES = range(4)

PATIENCE = 0.08
"""Seconds after which a held transfer is released, because an operation seems to wait for it."""

Kind = Literal["load", "save"]


class Side:
    """A context, whose sequences llama.cpp's own calls save and load."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def save(self, seq: int) -> bytes:
        return self.context.state_get(seq)

    def load(self, seq: int, state: bytes) -> None:
        assert self.context.state_set(seq, state) == len(state)

    def remove(self, seq: int) -> None:
        self.context.seq_rm(seq)


class Ferried(Side):
    """A context whose sequences kvferry saves and loads."""

    def __init__(self, context: Context, attachment: c_interface.Attachment) -> None:
        super().__init__(context)
        self.attachment = attachment

    def save(self, seq: int) -> bytes:
        buffer = ctypes.create_string_buffer(self.attachment.size(seq))
        assert self.attachment.save(seq, buffer, priority=1).wait() == "KVF_OK"
        return buffer.raw

    def load(self, seq: int, state: bytes) -> None:
        buffer = ctypes.create_string_buffer(state, len(state))
        assert self.attachment.load(seq, buffer, priority=1).wait() == "KVF_OK"

    def remove(self, seq: int) -> None:
        self.attachment.remove(seq)


Operation = Callable[[Side], Any]


def live_alike(*contexts: Context) -> None:
    """Gives contexts the same history.

    In a unified cache SPARE has the first cells, OWN the next ones, and OTHER and a fourth sequence
    alternate in the cells after that. All sequences but SPARE are longer than a sliding window. OWN
    has the second recurrent cell, between SPARE and OTHER.
    """
    for context in contexts:
        context.decode(SPARE, context.model.prompt(8, seed=13))
        context.decode(OWN, context.model.prompt(40, seed=12))
        context.decode_in_turn([OTHER, 3], 40)


@dataclasses.dataclass
class Outcome:
    """What has happened."""

    waited: bool
    """Whether the operation has waited for the transfer until that was released."""
    status: str
    """How the transfer ended."""
    differences: list[str]
    """What differs from the results of llama.cpp's own calls."""


@contextlib.contextmanager
def at_node(context: Context, node: int, reached: Callable[[], None]) -> Iterator[None]:
    """Calls `reached` after the operation with number `node`, counted from 1 in all graphs that
    llama.cpp computes in the ``with`` block. (On a CPU, llama.cpp asks after each operation whether
    to abort.)
    """
    count = 0

    @AbortCallback
    def ask(_: object) -> bool:
        nonlocal count
        count += 1
        if count == node:
            reached()
        return False

    llama.llama_set_abort_callback(context.pointer, ask, None)
    try:
        yield
    finally:
        llama.llama_set_abort_callback(context.pointer, AbortCallback(), None)


def differences(ours: Context, like: Context, ignored: frozenset[int] = frozenset()) -> list[str]:
    """Lists sequences whose states differ, or whose logits after one more token differ."""
    found = []
    compared = [seq for seq in SEQUENCES if seq not in ignored]
    for seq in compared:
        if ours.state_get(seq) != like.state_get(seq):
            found.append(f"state of {seq}")
    for seq in compared:
        if like.pos_max(seq) < 0:
            continue
        if ours.decode(seq, [7]).tobytes() != like.decode(seq, [7]).tobytes():
            found.append(f"logits of {seq}")
    return found


def beside_a_transfer(
    cuda: SimulatedCuda,
    ours: Context,
    like: Context,
    transfer: Kind,
    operation: Operation,
    *,
    before: Operation = lambda side: None,
    mode: int | None = None,
    release_at_node: int = 0,
    held: Literal["stream", "queue"] = "stream",
    patience: float = PATIENCE,
) -> Outcome:
    """Does `operation` in both contexts while OWN is moved in `ours`.

    A load restores OWN as it was after `live_alike`. Before, its cells are filled with other data,
    so that lost bytes are noticed. `before` is done in both contexts before the transfer. With
    `release_at_node`, all bytes of the transfer move while llama.cpp's graph is halted after that
    node. If the operation waits for the transfer, that is released after `patience` seconds.
    """
    live_alike(ours, like)
    loaded = like.state_get(OWN)
    if transfer == "load":
        for context in (ours, like):
            context.seq_rm(OWN)
            context.decode(OWN, context.model.prompt(40, seed=4))
    library = c_interface.Library(c_interface.LIBRARY)
    found = []
    with (
        library.engine(copy_threads=1) as engine,
        library.engine() as another,
        cuda.stream() as stream,
        engine.attach(ours.address) as attachment,
        another.attach(ours.address) as further,
    ):
        our_side, like_side = Ferried(ours, further), Side(like)
        before(our_side)
        before(like_side)
        hold = ByUrgentCopies(engine) if held == "queue" else ByStream(stream)
        if transfer == "load":
            state = ctypes.create_string_buffer(loaded, len(loaded))
            like_side.load(OWN, loaded)
            submit = attachment.load
        else:
            saved = like.state_get(OWN)
            state = ctypes.create_string_buffer(len(saved))
            submit = attachment.save
        with released_after(patience, hold) as waited:
            chosen = c_interface.IN_PLACE[transfer] if mode is None else mode
            job = submit(OWN, state, mode=chosen, **hold.options)
        assert not job.done or waited.is_set()

        def move_now() -> None:
            hold.release()
            wait_until(lambda: job.done)

        try:
            with (
                released_after(patience, hold) as waited,
                at_node(ours, release_at_node, move_now),
            ):
                ours_result = operation(our_side)
        finally:
            hold.release()
        status = job.wait()
        if ours_result != operation(like_side):
            found.append("result")
        if transfer == "save" and state.raw != saved:
            found.append("what was saved")
        found += differences(ours, like)
    return Outcome(waited.is_set(), status, found)


def moves_at_once(context: Context) -> bool:
    """Whether the submitting call moves a few bytes itself: those of a sliding window whose cells
    sequences share. (If the transfer follows a stream, decoding waits instead.)

    In builds that also save masked cells of a window, the call moves so many bytes that it would
    wait for a hold by urgent copies.
    """
    return shares_a_window(context) and not UNFRAMED


def shares_a_window(context: Context) -> bool:
    return context.model.n_swa > 0 and context.options.kv_unified


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
