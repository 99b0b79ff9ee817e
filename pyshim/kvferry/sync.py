"""Transfers without an event loop, and for code that runs on a context's thread.

with kvferry.sync.Engine() as engine:
    llama = engine.attach(llm)              # a llama_cpp.Llama, or the address of a context
    snapshot = llama.save(seq=0)
    llama.load(snapshot, seq=1)

Each call returns when the transfer has ended. Transfers are urgent by default, since the caller
waits for them. In an asynchronous program, ``await llama.run(...)`` runs code on the context's
thread; that code saves and loads with ``llama.sync``, because awaiting would wait for that thread.

KeyboardInterrupt, and any exception that a signal handler raises, cancels the transfer and is
raised after the transfer has ended. ``timeout`` is in seconds: then the transfer is cancelled, and
TimedOut is raised after it has ended, unless it has succeeded meanwhile.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeVar

from ._bridge.arguments import HostMemory, sequence_id
from ._bridge.attachment import Attachment
from ._bridge.block_list import BlocksAllowed, block_tokens, checked_key
from ._bridge.claims import claim_for_transfer
from ._bridge.completion_record import Completion, completion_of
from ._bridge.engine_core import EngineCore
from ._bridge.llama_cpp_object import LlmState
from ._bridge.open_engine import OpenEngine
from ._bridge.submission import (
    LoadMode,
    Priority,
    SaveMode,
    SubmitOptions,
    load_mode,
    save_mode,
    stream_handle,
)
from ._bridge.trace import TraceEvent
from ._native import ffi, lib
from .block_transfer import BlocksToSave, SaveOfBlocks, pinned_each
from .blocks import Block, BlocksToLoad, Checkpoint
from .buffer import Buffer, borrow, pinned, registered, trim
from .errors import BufferTooSmall, check, error
from .regions import Memory, RegionList, region_list
from .snapshot import Snapshot, state_to_load, to_verify

if TYPE_CHECKING:
    from ._native import CData

T = TypeVar("T")

# Signal handlers run between two waits of this length.
_WAIT_NS = 50_000_000
_FOREVER = -1  # KVF_FOREVER, a macro that cffi does not see


class Engine(OpenEngine):
    """Moves memory between devices and the host. Close it, or use it in a ``with`` statement.

    The arguments are those of ``kvferry.Engine``. Any thread may call any method.
    """

    _name = "kvferry.sync.Engine"

    def allocate(self, nbytes: int) -> Buffer:
        """As ``kvferry.Engine.allocate``."""
        return pinned(self._handle(), nbytes)

    def register(self, memory: HostMemory) -> Buffer:
        """As ``kvferry.Engine.register``."""
        return registered(self._handle(), memory)

    def trim(self) -> None:
        """As ``kvferry.Engine.trim``."""
        trim(self._handle())

    def attach(
        self,
        llm: object,
        *,
        library: str | None = None,
        allow_blocking: bool = False,
        variant: str = "",
    ) -> Llama:
        """As ``kvferry.Engine.attach``. No thread may decode during a call on the attachment."""
        attachment = self._attach(
            llm, library=library, allow_blocking=allow_blocking, variant=variant
        )
        return Llama(self, self._core, attachment)

    def copy_out(
        self,
        source: Memory,
        into: HostMemory | None = None,
        *,
        priority: Priority = "urgent",
        after_stream: int | None = None,
        timeout: float | None = None,
    ) -> Buffer:
        """As ``kvferry.Engine.copy_out``."""
        handle = self._handle()
        regions = region_list(source, writable=False, after_stream=after_stream)
        if into is None:
            buffer = pinned(handle, regions.nbytes)
        else:
            buffer = borrow(into, "into", writable=True)
        self._move(lib.kvf_regions_save, regions, buffer, priority, timeout)
        return buffer

    def copy_in(
        self,
        target: Memory,
        data: HostMemory,
        *,
        priority: Priority = "urgent",
        after_stream: int | None = None,
        timeout: float | None = None,
    ) -> None:
        """As ``kvferry.Engine.copy_in``."""
        self._handle()
        regions = region_list(target, writable=True, after_stream=after_stream)
        buffer = borrow(data, "data")
        regions.check_fits(buffer.nbytes)
        self._move(lib.kvf_regions_load, regions, buffer, priority, timeout)

    def _move(
        self,
        function: Callable[[int, CData, int, CData, int, CData, CData], int],
        regions: RegionList,
        buffer: Buffer,
        priority: Priority,
        timeout: float | None,
    ) -> None:
        handle, memory = self._handle(), buffer.memory

        def submit(options: CData, job: CData) -> int:
            return function(
                handle, regions.regions, regions.count, memory, buffer.nbytes, options, job
            )

        options = SubmitOptions(None, 0, priority, after_stream=regions.stream)
        writing = function is lib.kvf_regions_save
        _submit_and_wait(submit, options, [buffer], timeout, writing=writing)

    def describe(self) -> dict[str, Any]:
        """As ``kvferry.Engine.describe``."""
        return self._core.describe()

    def trace(self) -> list[TraceEvent]:
        """As ``kvferry.Engine.trace``."""
        return self._core.trace()

    def close(self) -> None:
        """Closes the engine after its transfers have ended, and detaches its contexts.

        Snapshots and buffers stay valid. Closing twice is allowed.
        """
        if not self._core.closed:
            self._core.close()
            self._finalizer.detach()

    def _handle(self) -> int:
        self._core.completions.check_usable()
        return self._core.handle

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Llama:
    """An attachment to a llama context, made by ``Engine.attach`` or ``kvferry.Llama.sync``.

    Each call waits until the context's thread has ended its current call, and keeps the thread from
    beginning another one until the transfer has been submitted. A call on that thread does not
    wait. Any thread may call any method.
    """

    def __init__(self, engine: object, core: EngineCore, attachment: Attachment) -> None:
        """For kvferry itself. This object keeps ``engine`` alive."""
        self._engine = engine
        self._core = core
        self._attachment = attachment

    @property
    def fingerprint(self) -> str:
        """As ``kvferry.Llama.fingerprint``."""
        return self._attachment.fingerprint

    def size(self, seq: int = 0) -> int:
        """As ``kvferry.Llama.size``."""
        return self._attachment.size(seq)

    def save(
        self,
        seq: int = 0,
        *,
        into: HostMemory | None = None,
        priority: Priority = "urgent",
        mode: SaveMode = "auto",
        timeout: float | None = None,
    ) -> Snapshot:
        """As ``kvferry.Llama.save``."""
        self._attachment.check_usable()
        seq = sequence_id(seq)
        memory, done, llm_state, _ = self._save(
            seq,
            lib.kvf_llama_save,
            self._attachment.measure,
            lambda _: None,
            SubmitOptions(None, 0, priority, mode=save_mode(mode)),
            into,
            timeout,
        )
        return Snapshot(
            memory, done.bytes, fingerprint=self.fingerprint, completion=done, llm=llm_state
        )

    def _save(
        self,
        seq: int,
        function: Callable[[int, int, CData, int, CData, CData], int],
        measure: Callable[[int], int],
        look: Callable[[int], T],
        options: SubmitOptions,
        into: HostMemory | None,
        timeout: float | None,
    ) -> tuple[CData, Completion, LlmState | None, T]:
        """Saves a sequence, or a part of its state, into one buffer.

        Returns the memory, the completion, what the ``llama_cpp.Llama`` knew, and what ``look``
        returned right before the submitting call.
        """
        attachment = self._attachment
        llm = attachment.llm_of(seq)
        with ExitStack() as until_submitted:
            until_submitted.enter_context(attachment.worker.exclusive())
            # No thread decodes meanwhile, so that the size stays right.
            if into is None:
                buffer = pinned(self._core.handle, measure(seq))
            else:
                buffer = borrow(into, "into", writable=True)
            memory = buffer.memory
            seen = look(seq)
            llm_state = None if llm is None else llm.state()

            def submit(native: CData, job: CData) -> int:
                with until_submitted:
                    return function(attachment.handle, seq, memory, buffer.nbytes, native, job)

            done = _submit_and_wait(submit, options, [buffer], timeout, writing=True)
        return memory, done, llm_state, seen

    def load(
        self,
        state: HostMemory,
        seq: int,
        *,
        priority: Priority = "urgent",
        mode: LoadMode = "auto",
        verify: bool = False,
        trust: bool = False,
        timeout: float | None = None,
    ) -> None:
        """As ``kvferry.Llama.load``."""
        self._attachment.check_usable()
        seq = sequence_id(seq)
        options = SubmitOptions(None, 0, priority, mode=load_mode(mode), trust=trust)
        if verify:
            to_verify(state).verify_sync()
        attachment = self._attachment
        buffer, llm_state = state_to_load(state, attachment)
        memory = buffer.memory

        def submit(native: CData, job: CData) -> int:
            return lib.kvf_llama_load(attachment.handle, seq, memory, buffer.nbytes, native, job)

        self._load(seq, submit, options, [buffer], llm_state, timeout)

    def _load(
        self,
        seq: int,
        submit: Callable[[CData, CData], int],
        options: SubmitOptions,
        buffers: Sequence[Buffer],
        llm_state: LlmState | None,
        timeout: float | None,
    ) -> None:
        """Makes the submitting call ``submit``, and does what must follow a load."""
        attachment = self._attachment
        llm = attachment.llm_of(seq)

        def submit_alone(native: CData, job: CData) -> int:
            with attachment.worker.exclusive():
                return submit(native, job)

        try:
            _submit_and_wait(submit_alone, options, buffers, timeout, writing=False)
        except BaseException:
            with attachment.worker.exclusive():
                if lib.kvf_llama_settle(attachment.handle) >= 0 and llm is not None:
                    llm.reset_if_emptied()
            raise
        if llm is not None:
            with attachment.worker.exclusive():
                llm.restore(llm_state)

    def blocks_allowed(self) -> tuple[BlocksAllowed, str]:
        """As ``kvferry.Llama.blocks_allowed``."""
        self._attachment.check_usable()
        return self._attachment.exclusively(self._attachment.blocks_allowed)

    def block_size(self, tokens: int = 256) -> int:
        """As ``kvferry.Llama.block_size``."""
        self._attachment.check_usable()
        tokens = block_tokens(tokens)
        return self._attachment.exclusively(self._attachment.measure_block, tokens)

    def checkpoint_size(self, seq: int = 0) -> int:
        """As ``kvferry.Llama.checkpoint_size``."""
        self._attachment.check_usable()
        seq = sequence_id(seq)
        return self._attachment.exclusively(self._attachment.measure_checkpoint, seq)

    def save_blocks(
        self,
        seq: int = 0,
        begin: int = 0,
        end: int | None = None,
        *,
        tokens: int = 256,
        into: Sequence[HostMemory] | None = None,
        keys: Sequence[bytes] | None = None,
        parent: bytes | None = None,
        priority: Priority = "urgent",
        mode: SaveMode = "auto",
        after_stream: int | None = None,
        timeout: float | None = None,
    ) -> list[Block]:
        """As ``kvferry.Llama.save_blocks``."""
        attachment = self._attachment
        attachment.check_usable()
        seq = sequence_id(seq)
        asked = BlocksToSave.checked(begin, end, tokens, into, keys, parent)
        options = SubmitOptions(
            None, 0, priority, mode=save_mode(mode), after_stream=stream_handle(after_stream)
        )
        llm = attachment.llm_of(seq)
        with ExitStack() as until_submitted:
            until_submitted.enter_context(attachment.worker.exclusive())
            # No thread decodes meanwhile, so that the positions stay right.
            spans = asked.spans(attachment, seq)
            sizes = [] if asked.into else attachment.measure_blocks(spans)
            repeated = False
            while True:
                buffers = asked.borrowed() or pinned_each(self._core.handle, sizes)
                save = SaveOfBlocks(asked, spans, buffers)
                llm_state = None if llm is None else save.llm_state(llm)

                def submit(native: CData, job: CData, save: SaveOfBlocks = save) -> int:
                    status = save.submit(attachment, seq, native, job)
                    if status >= 0:
                        until_submitted.close()
                    return status

                try:
                    done = _submit_and_wait(submit, options, buffers, timeout, writing=True)
                except BufferTooSmall:
                    if asked.into or repeated:
                        raise
                    # Positions repeat: only now is known how many cells a block has.
                    sizes, repeated = save.sizes, True
                    continue
                return save.saved(attachment, done, llm_state)

    def save_checkpoint(
        self,
        seq: int = 0,
        *,
        into: HostMemory | None = None,
        key: bytes | None = None,
        priority: Priority = "urgent",
        mode: SaveMode = "auto",
        after_stream: int | None = None,
        timeout: float | None = None,
    ) -> Checkpoint:
        """As ``kvferry.Llama.save_checkpoint``."""
        attachment = self._attachment
        attachment.check_usable()
        seq = sequence_id(seq)
        stream = stream_handle(after_stream)
        key = None if key is None else checked_key("key", key)
        memory, done, llm_state, position = self._save(
            seq,
            lib.kvf_llama_save_checkpoint,
            attachment.measure_checkpoint,
            attachment.last_position,
            SubmitOptions(None, 0, priority, mode=save_mode(mode), after_stream=stream),
            into,
            timeout,
        )
        return Checkpoint(
            memory,
            done.bytes,
            position=position,
            key=key,
            fingerprint=self.fingerprint,
            completion=done,
            llm=llm_state,
        )

    def load_blocks(
        self,
        blocks: Sequence[Block],
        seq: int,
        *,
        checkpoint: Checkpoint | None = None,
        priority: Priority = "urgent",
        mode: LoadMode = "auto",
        after_stream: int | None = None,
        timeout: float | None = None,
    ) -> None:
        """As ``kvferry.Llama.load_blocks``."""
        attachment = self._attachment
        attachment.check_usable()
        seq = sequence_id(seq)
        options = SubmitOptions(
            None, 0, priority, mode=load_mode(mode), after_stream=stream_handle(after_stream)
        )
        given = BlocksToLoad(blocks, checkpoint)
        given.check_model(attachment)

        def submit(native: CData, job: CData) -> int:
            return given.submit(attachment.handle, seq, native, job)

        self._load(seq, submit, options, given.parts, given.llm, timeout)

    def remove(self, seq: int) -> None:
        """As ``kvferry.Llama.remove``, but raises Busy while a transfer of it is in flight."""
        self._attachment.check_usable()
        seq = sequence_id(seq)
        with self._attachment.worker.exclusive():
            self._attachment.remove(seq)

    def describe(self) -> dict[str, Any]:
        """As ``kvferry.Llama.describe``."""
        self._attachment.check_usable()
        return self._attachment.describe()

    def detach(self) -> None:
        """Detaches after the attachment's transfers have ended; then the context may be freed.

        Raises Busy if tasks of an event loop wait for such transfers: use ``kvferry.Llama.detach``.
        """
        self._core.detach(self._attachment)

    def __repr__(self) -> str:
        return f"<kvferry.sync.Llama {self._core.text_of(self._attachment)}>"

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def _submit_and_wait(
    submit: Callable[[CData, CData], int],
    options: SubmitOptions,
    buffers: Sequence[Buffer],
    timeout: float | None,
    *,
    writing: bool,
) -> Completion:
    """Submits a transfer and waits for its end. When this raises, it is not in flight any more.

    Raises Busy if something else in this process uses one of the buffers.
    """
    claims = [
        claim_for_transfer(buffer.memory, buffer.nbytes, writing=writing) for buffer in buffers
    ]
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    # The C library writes the job's handle here, so that the handle is known even if an exception
    # interrupts what follows the submitting call.
    job = ffi.new("kvf_job *")
    try:
        for buffer, claim in zip(buffers, claims, strict=True):
            buffer.transfers.add(claim)
        check(submit(options.options, job), options.text)
        done, timed_out = _wait(job[0], deadline)
    except BaseException:
        if job[0]:
            _cancel_and_wait(job[0])
        raise
    finally:
        if job[0]:
            lib.kvf_job_release(job[0])
        for buffer, claim in zip(buffers, claims, strict=True):
            buffer.transfers.discard(claim)
    if done.status == lib.KVF_ERR_CANCELLED and timed_out:
        raise error(lib.KVF_ERR_TIMEOUT, f"{timeout} seconds")
    if done.status != lib.KVF_OK:
        raise error(done.status, done.detail)
    return done


def _wait(job: int, deadline: float) -> tuple[Completion, bool]:
    """Returns how the job ended, and whether it was cancelled because the time was up."""
    record = ffi.new("kvf_completion *")
    timed_out = False
    while True:
        seconds = math.inf if timed_out else deadline - time.monotonic()
        if seconds <= 0:
            timed_out = True
            lib.kvf_job_cancel(job)
        nanoseconds = min(_WAIT_NS, int(max(0.0, min(seconds, 1.0)) * 1e9))
        status = lib.kvf_job_wait(job, nanoseconds, record, ffi.sizeof("kvf_completion"))
        if status != lib.KVF_ERR_TIMEOUT:
            check(status)
            return completion_of(record), timed_out


def _cancel_and_wait(job: int) -> None:
    """Cancels a job and waits for its end: its memory must not be freed before."""
    lib.kvf_job_cancel(job)
    while True:
        try:
            lib.kvf_job_wait(job, _FOREVER, ffi.NULL, 0)
        except KeyboardInterrupt:
            continue  # another exception is being raised already, and this takes milliseconds
        return
