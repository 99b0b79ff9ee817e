"""Saves and loads of one sequence, from the submitting call to what follows the completion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, TypeVar

from ._bridge.attachment import Attachment
from ._bridge.completion_record import Completion
from ._bridge.llama_cpp_object import LlmState
from ._bridge.submission import Priority, SubmitOptions
from ._bridge.worker import Call
from ._native import ffi, lib
from .buffer import Buffer
from .errors import check
from .snapshot import Snapshot
from .transfer import Transfer

if TYPE_CHECKING:
    from ._native import CData

T = TypeVar("T")

LoadOutcome = Literal["in_flight", "loaded", "unchanged", "empty"]
"""What ``Llama.load_outcome`` returns for the latest load into a sequence.

- ``in_flight``: the load has not ended; a decode of the sequence waits for it.
- ``loaded``: the sequence holds the loaded state.
- ``unchanged``: the load was refused, or cancelled before it began; the sequence is as it was.
- ``empty``: the load failed, or was cancelled, after it had begun; the sequence is empty."""


class SequenceTransfer(Transfer[T]):
    """A save or a load of one sequence."""

    def __init__(
        self,
        attachment: Attachment,
        seq: int,
        buffers: Sequence[Buffer],
        result: Callable[[Completion], T],
        *,
        writes_buffers: bool,
    ) -> None:
        super().__init__(
            attachment.worker.completions, buffers, None, result, writes_buffers=writes_buffers
        )
        self._attachment = attachment
        self.seq = seq
        self._llm = attachment.llm_of(seq)
        self._llm_state: LlmState | None = None

    def expect(self) -> None:
        self._attachment.in_flight[self] = self.seq
        super().expect()

    async def submit(
        self,
        priority: Priority,
        mode: int,
        *,
        first: bool,
        trust: bool = False,
        after_stream: int | None = None,
        each_block: bool = False,
    ) -> None:
        """Makes the submitting call on the context's thread; ``first`` before other calls that wait
        there.

        When this raises, whatever the reason, the transfer is not in flight any more.
        """
        worker = self._attachment.worker
        options = SubmitOptions(
            worker.completions,
            self.token,
            priority,
            mode=mode,
            trust=trust,
            after_stream=after_stream,
            each_block=each_block,
        )

        def make_call() -> None:
            self.prepare()
            status = self.submitting_call(options.options, self.job_place)
            if status < 0:
                self.submit_failed()
            check(status, options.text)

        def after_call(_: Call) -> None:
            self.after_submit()

        call = worker.make(make_call, after=after_call)
        try:
            self.expect()
            worker.ask_for(call, first=first)
            await worker.outcome(call)
        except GeneratorExit:
            raise
        except BaseException:
            # The call has failed; or a cancellation or a signal handler has interrupted this,
            # before, during or after the call. A call that has not begun is cancelled, else its
            # job. Twice: see completions.py.
            try:
                call.cancel()
            finally:
                call.cancel()
            if not self.ended:
                await self.abort()
            raise

    def prepare(self) -> None:
        """Called right before the submitting call, on the context's thread."""

    def submitting_call(self, options: CData, job: CData) -> int:
        """Calls the function of the C library that submits this, and returns its status."""
        raise NotImplementedError

    def submit_failed(self) -> None:
        """Called if the submitting call has returned an error, on the context's thread."""

    def follow_up(self, completion: Completion) -> Call | None:
        self._attachment.in_flight.pop(self, None)
        return None

    def withdrawn(self) -> None:
        super().withdrawn()
        self._attachment.in_flight.pop(self, None)

    def _drop_memory(self) -> None:
        super()._drop_memory()
        self._llm_state = None


class WrongSize(Exception):
    """The pool buffer for a save is too small for the sequence, or far too large."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size
        """Size in bytes of what is to be saved."""


class BufferSave(SequenceTransfer[T]):
    """A save of one sequence, or of a part of its state, into one buffer."""

    def __init__(self, attachment: Attachment, seq: int, buffer: Buffer, *, pooled: bool) -> None:
        """``pooled``: the buffer is of the pool, and was allocated by the size of an earlier save.
        Then the submitting call raises WrongSize if the buffer does not fit."""
        super().__init__(attachment, seq, [buffer], self._saved, writes_buffers=True)
        self._memory: CData | None = buffer.memory
        self._pooled = pooled

    def prepare(self) -> None:
        if self._pooled:
            size = self._measure()
            if not size <= self._nbytes <= 2 * size + 131072:
                raise WrongSize(size)
        if self._llm is not None:
            self._llm_state = self._llm.state()

    def _measure(self) -> int:
        """Returns how many bytes are to be saved. Called on the context's thread."""
        raise NotImplementedError

    def _saved(self, done: Completion) -> T:
        """Returns the result, of memory that the buffer keeps alive."""
        raise NotImplementedError

    def _drop_memory(self) -> None:
        super()._drop_memory()
        self._memory = None


class SaveTransfer(BufferSave[Snapshot]):
    """A save of one sequence."""

    def _subject(self) -> str:
        return f"that saves sequence {self.seq}"

    def submitting_call(self, options: CData, job: CData) -> int:
        handle = self._attachment.handle
        return lib.kvf_llama_save(handle, self.seq, self._memory, self._nbytes, options, job)

    def _measure(self) -> int:
        return self._attachment.measure(self.seq)

    def _saved(self, done: Completion) -> Snapshot:
        return Snapshot(
            self._memory,
            done.bytes,
            fingerprint=self._attachment.fingerprint,
            completion=done,
            llm=self._llm_state,
        )


class LoadTransfer(SequenceTransfer[None]):
    """A load of one sequence."""

    _failure_left_nothing = False

    def __init__(
        self,
        attachment: Attachment,
        seq: int,
        buffers: Sequence[Buffer],
        llm_state: LlmState | None,
        latest_loads: dict[int, LoadTransfer | None],
    ) -> None:
        """``submit`` enters it into ``latest_loads``. A state has one buffer."""
        super().__init__(attachment, seq, buffers, lambda _: None, writes_buffers=False)
        self._llm_state = llm_state
        self._latest_loads = latest_loads

    def _subject(self) -> str:
        return f"that loads sequence {self.seq}"

    def submitting_call(self, options: CData, job: CData) -> int:
        (buffer,) = self._buffers.values()
        handle = self._attachment.handle
        return lib.kvf_llama_load(handle, self.seq, buffer.memory, buffer.nbytes, options, job)

    def expect(self) -> None:
        self._latest_loads[self.seq] = self
        super().expect()

    def follow_up(self, completion: Completion) -> Call | None:
        super().follow_up(completion)
        worker = self._attachment.worker
        if worker.stopped:
            return None  # the detach settles too
        # This call is the next one on the context's thread, whether or not a task waits for this
        # transfer.
        if completion.status != lib.KVF_OK:
            return worker.make(self._settle)
        if self._llm is not None:
            return worker.make(self._llm.restore, self._llm_state)
        return None

    def _settle(self) -> None:
        """Frees the cells that were taken for the state, whose bytes are not there."""
        lib.kvf_llama_settle(self._attachment.handle)
        if self._llm is not None:
            self._llm.reset()

    def submit_failed(self) -> None:
        # Only the C library knows which refusals empty the sequence. A save of an empty sequence
        # fails with SEQUENCE_EMPTY before the buffer's size is checked. So a save into one byte
        # tells whether it is empty.
        status = lib.kvf_llama_save(
            self._attachment.handle, self.seq, ffi.new("uint8_t[1]"), 1, ffi.NULL, ffi.NULL
        )
        self._failure_left_nothing = status == lib.KVF_ERR_SEQUENCE_EMPTY
        if self._failure_left_nothing and self._llm is not None:
            self._llm.reset()

    @property
    def outcome(self) -> LoadOutcome:
        if not self.ended:
            return "in_flight"
        if self.completion is None:
            return "empty" if self._failure_left_nothing else "unchanged"
        return "loaded" if self.completion.status == lib.KVF_OK else "empty"
