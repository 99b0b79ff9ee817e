"""Operations on a context while a transfer of kvferry is held in flight.

There are two contexts with the same history (sides.py). In `ours` a transfer is held (holds.py), so
that only those of its bytes move that the submitting call moves itself. In `like` llama.cpp's own
call does at once what the transfer will do. Then the same operation (operations.py) is done in
both. The transfer is released after the operation, or before if the operation waits for the
transfer. In the end no byte of any sequence and no logits may differ.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

from support import c_interface
from support.holds import ByStream, ByUrgentCopies, Hold, released_after, wait_until
from support.llama_reference import UNFRAMED, AbortCallback, Context, llama
from support.sides import OWN, SEQUENCES, Ferried, Operation, Side, live_alike
from support.simulated_cuda import SimulatedCuda

PATIENCE = 0.08
"""Seconds after which a held transfer is released, because an operation seems to wait for it."""

Kind = Literal["load", "save"]


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
        ours_result, has_waited = _until_released(
            operation, our_side, job, hold, release_at_node, patience
        )
        status = job.wait()
        if ours_result != operation(like_side):
            found.append("result")
        if transfer == "save" and state.raw != saved:
            found.append("what was saved")
        found += differences(ours, like)
    return Outcome(has_waited, status, found)


def _until_released(
    operation: Operation,
    side: Side,
    job: c_interface.Job,
    hold: Hold,
    release_at_node: int,
    patience: float,
) -> tuple[Any, bool]:
    """Does the operation while the job is held, and releases the job. Returns the result, and
    whether the operation has waited for the job.
    """

    def move_now() -> None:
        hold.release()
        wait_until(lambda: job.done)

    try:
        with (
            released_after(patience, hold) as waited,
            at_node(side.context, release_at_node, move_now),
        ):
            result = operation(side)
    finally:
        hold.release()
    return result, waited.is_set()


def moves_at_once(context: Context) -> bool:
    """Whether the submitting call moves a few bytes itself: those of a sliding window whose cells
    sequences share. (If the transfer follows a stream, decoding waits instead.)

    In builds that also save masked cells of a window, the call moves so many bytes that it would
    wait for a hold by urgent copies.
    """
    return shares_a_window(context) and not UNFRAMED


def shares_a_window(context: Context) -> bool:
    return context.model.n_swa > 0 and context.options.kv_unified
