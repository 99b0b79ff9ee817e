"""Saves and loads of one sequence, from before the submitting call to after the completion."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypeVar

from ._bridge.attachment import Attachment
from ._bridge.completion import Completion
from ._bridge.llm import LlmState
from ._bridge.worker import Call
from ._native import ffi, lib
from .buffer import Buffer
from .snapshot import Snapshot
from .transfer import Transfer

if TYPE_CHECKING:
    from ._native import CData

T = TypeVar("T")

LoadOutcome = Literal["in_flight", "loaded", "unchanged", "empty"]
"""What ``Llama.load_outcome`` tells of the latest load into a sequence.

- ``in_flight``: it has not ended; the sequence must not be used.
- ``loaded``: the sequence holds the state.
- ``unchanged``: it was cancelled before it began, or refused before it cost anything; the sequence
  holds what it held before.
- ``empty``: it was cancelled, or failed, after it had begun; the sequence is empty."""


class SequenceTransfer(Transfer[T]):
    """A save or a load of one sequence."""

    def __init__(
        self,
        attachment: Attachment,
        seq: int,
        buffer: Buffer,
        result: Callable[[Completion], T],
        *,
        writes_buffer: bool,
    ) -> None:
        super().__init__(
            attachment.worker.completions, buffer, None, result, writes_buffer=writes_buffer
        )
        self._attachment = attachment
        self.seq = seq
        self._llm = attachment.llm_of(seq)
        self._llm_state: LlmState | None = None

    def expect(self) -> None:
        self._attachment.in_flight[self] = self.seq
        super().expect()

    def about_to_begin(self) -> None:
        """The submitting call comes next. For the context's thread."""

    def refused(self) -> None:
        """The submitting call has failed. For the context's thread."""

    def follow_up(self, completion: Completion) -> Call | None:
        self._attachment.in_flight.pop(self, None)
        return None

    def withdrawn(self) -> None:
        super().withdrawn()
        self._attachment.in_flight.pop(self, None)

    def _let_go(self) -> None:
        super()._let_go()
        self._llm_state = None


class SaveTransfer(SequenceTransfer[Snapshot]):
    """A save of one sequence."""

    def __init__(self, attachment: Attachment, seq: int, buffer: Buffer) -> None:
        memory = buffer.memory
        super().__init__(
            attachment, seq, buffer, lambda done: self._snapshot(memory, done), writes_buffer=True
        )

    def _subject(self) -> str:
        return f"that saves sequence {self.seq}"

    def about_to_begin(self) -> None:
        if self._llm is not None:
            self._llm_state = self._llm.state()

    def _snapshot(self, memory: CData, done: Completion) -> Snapshot:
        return Snapshot(
            memory,
            done.bytes,
            fingerprint=self._attachment.fingerprint,
            completion=done,
            llm=self._llm_state,
        )


class Misfit(Exception):
    """The buffer that a sequence was to be saved into is too small for it, or far too large."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size
        """Of the state, in bytes."""


class PooledSaveTransfer(SaveTransfer):
    """A save into a buffer that was allocated before anybody looked at the sequence."""

    def about_to_begin(self) -> None:
        size = self._attachment.measure(self.seq)
        if not size <= self._nbytes <= 2 * size + 131072:
            raise Misfit(size)
        super().about_to_begin()


class LoadTransfer(SequenceTransfer[None]):
    """A load of one sequence."""

    _refusal_left_nothing = False

    def __init__(
        self,
        attachment: Attachment,
        seq: int,
        buffer: Buffer,
        llm_state: LlmState | None,
        latest_loads: dict[int, LoadTransfer | None],
    ) -> None:
        """It enters ``latest_loads`` when its submission has been asked for."""
        super().__init__(attachment, seq, buffer, lambda _: None, writes_buffer=False)
        self._llm_state = llm_state
        self._latest_loads = latest_loads

    def _subject(self) -> str:
        return f"that loads sequence {self.seq}"

    def expect(self) -> None:
        self._latest_loads[self.seq] = self
        super().expect()

    def follow_up(self, completion: Completion) -> Call | None:
        super().follow_up(completion)
        worker = self._attachment.worker
        if worker.stopped:
            return None  # detaching settles too
        # Made before anything else runs on the context's thread, whether or not somebody waits for
        # this transfer.
        if completion.status != lib.KVF_OK:
            return worker.make(self._settle)
        if self._llm is not None:
            return worker.make(self._llm.restore, self._llm_state)
        return None

    def _settle(self) -> None:
        """Frees the cells, which were taken and are without their bytes."""
        lib.kvf_llama_settle(self._attachment.handle)
        if self._llm is not None:
            self._llm.reset()

    def refused(self) -> None:
        # Which refusals empty the sequence is the C library's business. It says of an empty one
        # that there is nothing to save, before it says that a byte is too little room.
        status = lib.kvf_llama_save(
            self._attachment.handle, self.seq, ffi.new("uint8_t[1]"), 1, ffi.NULL, ffi.NULL
        )
        self._refusal_left_nothing = status == lib.KVF_ERR_SEQUENCE_EMPTY
        if self._refusal_left_nothing and self._llm is not None:
            self._llm.reset()

    @property
    def outcome(self) -> LoadOutcome:
        if not self.ended:
            return "in_flight"
        if self.completion is None:
            return "empty" if self._refusal_left_nothing else "unchanged"
        return "loaded" if self.completion.status == lib.KVF_OK else "empty"
