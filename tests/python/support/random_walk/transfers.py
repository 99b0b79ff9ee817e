"""Transfers: kvferry's in one context, llama.cpp's own calls in the other."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from support import c_interface
from support.devices import ON_GPU
from support.holds import ByStream, ByUrgentCopies, Hold, NoHold, released_after
from support.in_flight import moves_at_once
from support.random_walk.decoding import Decoding
from support.random_walk.state import PATIENCE, InFlight, Unequal, WalkState

STATES_KEPT = 6
LOAD_MODES = tuple(c_interface.LoadMode)
IN_PLACE, SNAPSHOT = c_interface.SaveMode.IN_PLACE, c_interface.SaveMode.SNAPSHOT


Submit = Callable[..., c_interface.Job]
"""Submits a transfer by an attachment, with options of `c_interface.Attachment.save`."""


@dataclasses.dataclass
class Moved:
    """A transfer that is about to start."""

    direction: Literal["save", "load"]
    submit: Submit
    read: Callable[[], bytes]
    """Returns the bytes of its buffers."""
    expected: bytes
    """What they hold when it has ended."""
    state: bytes
    """The whole state of the sequence."""
    mode: int
    is_snapshot: bool = False
    may_be_decoded: bool = False
    """Whether the sequence may be decoded meanwhile."""


class Transfers:
    def __init__(self, walk: WalkState, decoding: Decoding) -> None:
        self._walk = walk
        self._decoding = decoding

    def start(self, seq: int, moved: Moved) -> c_interface.Failure | None:
        """Begins a transfer; returns the status if it was refused."""
        walk = self._walk
        attachment = walk.random.choice(walk.attachments)
        hold = self._hold(seq, attachment, may_be_held=not moved.is_snapshot)
        held = hold.holds(len(moved.expected))
        walk.note(f"{seq} mode {moved.mode}{' held' if held else ''}")
        try:
            with released_after(PATIENCE, *walk.in_flight.values(), hold) as waited:
                job = moved.submit(attachment, mode=moved.mode, **hold.options)
        except BaseException as failure:
            hold.release()
            if isinstance(failure, c_interface.Failure):
                return failure
            raise
        walk.in_flight[seq] = InFlight(
            moved.direction,
            job,
            attachment,
            moved.read,
            moved.expected,
            moved.state,
            hold,
            held=held and not waited.is_set(),
            may_be_decoded=moved.may_be_decoded,
        )
        return None

    def _hold(self, seq: int, attachment: c_interface.Attachment, may_be_held: bool) -> Hold:
        walk = self._walk
        priority = walk.random.randrange(2)
        if not may_be_held or walk.random.random() > 0.7:
            return NoHold(priority)
        if moves_at_once(walk.ours) and not ON_GPU and walk.random.random() < 0.7:
            return ByUrgentCopies(attachment.engine)
        return ByStream(walk.streams[seq], priority)

    def choose_to_save(self) -> int | None:
        walk = self._walk
        resting = [seq for seq in walk.resting() if seq not in walk.copy_pending]
        return walk.choose(walk.holding_cells(resting)) if walk.attachments else None

    def save(self) -> None:
        walk = self._walk
        seq = self.choose_to_save()
        if seq is None:
            return
        state = walk.like.state_get(seq)
        buffer = ctypes.create_string_buffer(len(state))
        mode = walk.random.choice((0, IN_PLACE, SNAPSHOT))
        is_snapshot = (mode or (IN_PLACE if walk.can.appends else SNAPSHOT)) == SNAPSHOT

        def submit(attachment: c_interface.Attachment, **options: Any) -> c_interface.Job:
            return attachment.save(seq, buffer, **options)

        def read() -> bytes:
            return buffer.raw

        may_be_decoded = walk.can.appends or is_snapshot
        moved = Moved("save", submit, read, state, state, mode, is_snapshot, may_be_decoded)
        if failure := self.start(seq, moved):
            raise failure

    def load(self) -> None:
        walk = self._walk
        seq = walk.choose(walk.loadable())
        if seq is None or not walk.attachments or not walk.states:
            return
        self._load_state(seq, walk.random.choice(walk.states))

    def _load_state(self, seq: int, state: bytes) -> None:
        buffer = ctypes.create_string_buffer(state, len(state))

        def submit(attachment: c_interface.Attachment, **options: Any) -> c_interface.Job:
            return attachment.load(seq, buffer, **options)

        self.load_by(submit, seq, state)

    def load_by(self, submit: Submit, seq: int, state: bytes) -> None:
        """Loads a state in both contexts; in kvferry's by `submit`."""
        walk = self._walk
        mode = walk.random.choice(LOAD_MODES)
        moved = Moved("load", submit, lambda: state, state, state, mode)
        failure = self.start(seq, moved)
        read = walk.like.state_set(seq, state)
        walk.forget_edits(seq)
        if (read == len(state)) != (failure is None):
            raise Unequal(f"a load was refused by one: {read} of {len(state)} bytes, {failure}")
        if failure:
            walk.note(failure.name)
            for context in walk.both():
                context.seq_rm(seq)

    def load_a_window(self) -> None:
        """Loads a state after free cells, and decodes another sequence: llama.cpp looks for cells
        there, and finds those of the load.
        """
        walk = self._walk
        free = walk.loadable()
        if len(free) < 3 or not walk.attachments:
            return
        first, loaded, other = walk.random.sample(free, 3)
        walk.note(f"{loaded} behind {first}, then {other}")
        for context in walk.both():
            context.seq_rm(first)
            context.seq_rm(loaded)
        walk.forget_edits(first)
        walk.forget_edits(loaded)
        few = walk.random.choice((2, 8))
        self._decoding.decode_tokens([first] * few)
        self._decoding.decode_tokens([loaded] * walk.random.choice((33, 40, 60)))
        if walk.like.pos_max(loaded) < 32:
            return  # the cache is full
        walk.states.append(walk.like.state_get(loaded))
        self._load_state(loaded, walk.states[-1])
        if first in walk.resting() and other in walk.resting():
            for context in walk.both():
                context.seq_rm(first)
            self._decoding.decode_tokens([other] * (few + walk.random.choice((1, 4, 20))))

    def load_by_llama_cpp(self) -> None:
        walk = self._walk
        seq = walk.choose(walk.loadable())
        if seq is None or not walk.states:
            return
        walk.note(f"{seq}")
        state = walk.random.choice(walk.states)
        with walk.not_for_ever():
            ours = walk.ours.state_set(seq, state)
        if ours != walk.like.state_set(seq, state):
            raise Unequal("a load by llama.cpp was refused by one")
        walk.forget_edits(seq)
        if not ours:
            for context in walk.both():
                context.seq_rm(seq)

    def end(self) -> None:
        """Waits for a transfer."""
        walk = self._walk
        seq = walk.choose(list(walk.in_flight))
        if seq is not None:
            walk.note(f"{seq}")
            self.collect(seq, walk.in_flight[seq])

    def collect(self, seq: int, transfer: InFlight) -> None:
        # All of them, because one hold may hold several transfers.
        walk = self._walk
        walk.release_all()
        status = transfer.job.wait()
        del walk.in_flight[seq]
        if status != "KVF_OK":
            raise Unequal(f"a {transfer.direction} of sequence {seq} ended with {status}")
        if transfer.direction == "save":
            if transfer.read() != transfer.expected:
                raise Unequal(f"what was saved of sequence {seq}")
            walk.states.append(transfer.state)
            if len(walk.states) > STATES_KEPT:
                walk.states.pop(walk.random.randrange(STATES_KEPT))

    def detach(self) -> None:
        walk = self._walk
        if len(walk.attachments) < 2:
            return
        gone = walk.attachments.pop(walk.random.randrange(len(walk.attachments)))
        for transfer in walk.in_flight.values():
            if transfer.attachment is gone:
                walk.release_all()
        gone.detach()
        for seq, transfer in list(walk.in_flight.items()):
            if transfer.attachment is gone:
                self.collect(seq, transfer)
