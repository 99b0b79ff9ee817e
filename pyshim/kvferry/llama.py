"""The sequences of a llama.cpp context."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

import anyio
import anyio.lowlevel

from ._bridge.arguments import HostMemory, choice, sequence_id
from ._bridge.completions import Completion, see_through
from ._bridge.core import Attachment, Core, describe
from ._bridge.llm import LlmState
from ._bridge.worker import Call, context_worker
from ._native import ffi, lib
from .buffer import Buffer, borrow
from .errors import ErrorText, check, error
from .snapshot import Snapshot
from .transfer import Priority, SubmitOptions, Transfer, carried_out, in_flight

if TYPE_CHECKING:
    from . import sync
    from ._native import CData
    from .engine import Engine

P = ParamSpec("P")
T = TypeVar("T")

SaveMode = Literal["auto", "in_place", "snapshot"]
"""``in_place`` moves bytes straight from the cache: until the save has ended, the sequence must not
be removed, shifted, divided or copied onto, nor decoded if it is recurrent or sliding-window.
``snapshot`` copies them aside first: the sequence is free as soon as the save has been started.
``auto`` is ``snapshot`` where decoding the sequence would overwrite what is being saved, else
``in_place``."""

_SAVE_MODES: dict[str, int] = {
    "auto": lib.KVF_SAVE_AUTO,
    "in_place": lib.KVF_SAVE_IN_PLACE,
    "snapshot": lib.KVF_SAVE_SNAPSHOT,
}

LoadMode = Literal["auto", "in_place", "ahead"]
"""``ahead`` brings the bytes to device memory of their own while llama.cpp still takes cells.
``auto`` is ``in_place``: straight to the cache."""

_LOAD_MODES: dict[str, int] = {
    "auto": lib.KVF_LOAD_AUTO,
    "in_place": lib.KVF_LOAD_IN_PLACE,
    "ahead": lib.KVF_LOAD_AHEAD,
}


def save_mode(mode: SaveMode) -> int:
    return choice("mode", mode, _SAVE_MODES)


def load_mode(mode: LoadMode) -> int:
    return choice("mode", mode, _LOAD_MODES)


LoadOutcome = Literal["in_flight", "loaded", "unchanged", "empty"]
"""What ``Llama.load_outcome`` tells of the latest load into a sequence.

- ``in_flight``: it has not ended; the sequence must not be used.
- ``loaded``: the sequence holds the state.
- ``unchanged``: it was cancelled before it began, or refused before it cost anything; the sequence
  holds what it held before.
- ``empty``: it was cancelled, or failed, after it had begun; the sequence is empty."""


class Llama:
    """An attachment to a llama context; made by ``Engine.attach``.

    Whatever touches the context runs on one thread of its own: what kvferry captures, and the
    program's own code, decoding above all, through ``run``. All attachments to a context share that
    thread, those of other engines too. A program that decodes elsewhere must see to it that
    nothing of these objects is being started, settled or measured meanwhile; transfers that have
    been started may go on.

    What ``run`` runs, and the tasks that it starts, must not await this object or close its engine:
    the thread would wait for itself. That raises RuntimeError.
    """

    def __init__(self, engine: Engine, core: Core, attachment: Attachment, variant: str) -> None:
        self._engine = engine
        self._core = core
        self._attachment = attachment
        self._variant = variant
        description = self.describe()
        self._model: str = description["model"]
        self.fingerprint: str = description["fingerprint"]
        """Identity of the model, with the ``variant`` that ``attach`` was given.

        A hash of what libllama tells of the model: its description, size, number of parameters and
        metadata. A load refuses a Snapshot of another one with StateMismatch. It does not cover
        what libllama doesn't tell: weights (two models that differ in nothing else have one
        fingerprint), adapters, control vectors, the context's own settings of RoPE; for those there
        is ``variant``. Nor does it cover types, streams and layout of the cache: a state says them
        itself, and a load refuses one of another cache, likewise with StateMismatch.
        """

    # ---- The context's thread -------------------------------------------------------------------

    async def run(self, function: Callable[P, T], /, *arguments: P.args, **keywords: P.kwargs) -> T:
        """Runs the program's own code on the context's thread, in turn with everything else there.

        ``await llama.run(llm.eval, tokens)``. Transfers that are urgent go before it while it waits
        for its turn. A cancelled task waits for its end if it has begun.
        """
        self._check_usable()
        self._attachment.worker.check_awaitable()
        await anyio.lowlevel.checkpoint_if_cancelled()
        call = functools.partial(function, *arguments, **keywords)
        return await self._attachment.worker.call(call)

    @property
    def sync(self) -> sync.Llama:
        """The same in calls that block, for code on the context's thread: see ``kvferry.sync``."""
        from . import sync

        return sync.Llama(self, self._core, self._attachment)

    # ---- Size -----------------------------------------------------------------------------------

    def size(self, seq: int = 0) -> int:
        """Size of a sequence's state in bytes; moves none of it. A few bytes if it is empty.

        Blocks while the context's thread is at work, for up to a decode step: in an event loop
        that must not stall prefer ``size_async``. Raises SequenceRange, ContextFreed.
        """
        self._check_usable()
        seq = sequence_id(seq)
        with self._attachment.worker.exclusive():
            return self._attachment.measure(seq)

    async def size_async(self, seq: int = 0) -> int:
        """As ``size``, on the context's thread."""
        self._check_usable()
        return await self._attachment.worker.call(self._attachment.measure, sequence_id(seq))

    # ---- Save -----------------------------------------------------------------------------------

    async def save(
        self,
        seq: int = 0,
        *,
        into: HostMemory | None = None,
        priority: Priority = "background",
        mode: SaveMode = "auto",
    ) -> Snapshot:
        """Saves a sequence. The sequence stays as it is.

        ``into`` is writable contiguous memory of the caller's, of at least ``size`` bytes, which
        then belongs to the snapshot, until that is closed or dropped; or None for pinned memory.
        What may be done to the sequence meanwhile depends on ``mode``. A plain attention cache may
        be decoded further.

        Cancelling the task cancels the transfer, waits for its end, and drops what was saved.
        Raises SequenceRange, SequenceEmpty, BufferTooSmall, PinnedLimit, Busy (a load into the
        sequence is in flight; or ``into`` is used by a transfer in flight, or by a Snapshot),
        EngineClosed, ContextFreed.
        """
        return await carried_out(self.start_save(seq, into=into, priority=priority, mode=mode))

    async def start_save(
        self,
        seq: int = 0,
        *,
        into: HostMemory | None = None,
        priority: Priority = "background",
        mode: SaveMode = "auto",
    ) -> Transfer[Snapshot]:
        """As ``save``, but returns as soon as the sequence's layout has been captured."""
        self._check_usable()
        seq = sequence_id(seq)
        number = save_mode(mode)
        self._attachment.worker.check_awaitable()
        await anyio.lowlevel.checkpoint_if_cancelled()
        first = priority == "urgent"
        if into is not None:
            buffer = borrow(into, "into", writable=True)
            transfer = SaveTransfer(self._core, self._attachment, seq, buffer, self.fingerprint)
            await self._submit(transfer, lib.kvf_llama_save, buffer, priority, number, first)
            return transfer
        # Pinning new memory takes long, so not on the context's thread. That is why the size has to
        # be known before: it is taken from the last save, and looked at again on the thread.
        attachment = self._attachment
        expected, measured = attachment.sizes.get(seq), False
        while True:
            if expected is None:
                expected = await attachment.worker.call(attachment.measure, seq, first=first)
                first = measured = True  # it has had its turn
            try:
                buffer = await self._engine.allocate(expected + expected // 16 + 65536)
            except MemoryError:
                if measured:
                    raise
                expected = None  # it may have been larger then
                continue
            transfer = PooledSaveTransfer(self._core, attachment, seq, buffer, self.fingerprint)
            try:
                await self._submit(transfer, lib.kvf_llama_save, buffer, priority, number, first)
            except Misfit as misfit:
                expected = misfit.size
                first = measured = True  # likewise
                continue
            return transfer

    # ---- Load -----------------------------------------------------------------------------------

    async def load(
        self,
        state: HostMemory,
        seq: int,
        *,
        priority: Priority = "background",
        mode: LoadMode = "auto",
        verify: bool = False,
        trust: bool = False,
    ) -> None:
        """Loads a state into a sequence, replacing what that held.

        ``state`` is a Snapshot, or contiguous memory that holds a state and nothing else. The
        sequence must not be used until this returns. ``verify`` compares a Snapshot's checksum
        first.

        If this raises, ``load_outcome`` tells what the sequence holds: what it held before, where
        the load was refused (StateMismatch, StateDamaged) or cancelled before it had cost anything;
        the state, where the load was faster than its cancellation; else nothing.

        With ``mode="ahead"`` the bytes go to device memory of their own at once, while llama.cpp
        still takes cells and lists fragments, and from there to their places: sooner done, for as
        much device memory as the state has bytes, which is kept for the next such load for half a
        minute. Where there is not as much, or no CUDA device has the cache, and with ``"in_place"``
        and ``"auto"``, they go straight to the cache.

        ``trust`` hands llama.cpp a state that nothing vouches for: one that kvferry has not saved,
        for a cache whose format it does not know (``describe`` says ``"opaque"``). Without it such
        a state is StateDamaged. llama.cpp trusts what it loads: a damaged state may end the
        process, or leave cells that only clearing the memory frees.

        Raises StateMismatch and StateDamaged, CacheFull, SequenceRange, Busy (a transfer of this
        sequence is in flight), EngineClosed, ContextFreed.
        """
        if verify:
            if not isinstance(state, Snapshot):
                raise TypeError("only a Snapshot can be verified")
            seq = sequence_id(seq)
            self._attachment.latest_loads[seq] = None
            await state.verify()
        await carried_out(self.start_load(state, seq, priority=priority, mode=mode, trust=trust))

    async def start_load(
        self,
        state: HostMemory,
        seq: int,
        *,
        priority: Priority = "background",
        mode: LoadMode = "auto",
        trust: bool = False,
    ) -> Transfer[None]:
        """As ``load``, but returns as soon as the cells of the sequence have been taken."""
        self._check_usable()
        seq = sequence_id(seq)
        number = load_mode(mode)
        self._attachment.latest_loads[seq] = None
        self._attachment.worker.check_awaitable()
        await anyio.lowlevel.checkpoint_if_cancelled()
        buffer = borrow(state, "state")
        self._check_fingerprint(state)
        llm_state = state.llm if isinstance(state, Snapshot) else None
        transfer = LoadTransfer(self._core, self._attachment, seq, buffer, llm_state)
        flags = lib.KVF_SUBMIT_TRUST_STATE if trust else 0
        first = priority == "urgent"
        await self._submit(
            transfer, lib.kvf_llama_load, buffer, priority, number, first, flags=flags
        )
        return transfer

    def load_outcome(self, seq: int) -> LoadOutcome | None:
        """What has become of the latest load into a sequence; None if there has been none.

        Of the loads that were asked for through this object. After one that was cancelled, ask
        before the next await: another task may load too.
        """
        loads = self._attachment.latest_loads
        if seq not in loads:
            return None
        transfer = loads[seq]
        return "unchanged" if transfer is None else transfer.outcome

    def _check_fingerprint(self, state: object) -> None:
        if isinstance(state, Snapshot) and state.fingerprint not in (None, self.fingerprint):
            raise error(lib.KVF_ERR_STATE_MISMATCH, f"{state.fingerprint}, here {self.fingerprint}")

    async def _submit(
        self,
        transfer: SequenceTransfer[Any],
        function: Callable[[int, int, CData, int, CData, CData], int],
        buffer: Buffer,
        priority: Priority,
        mode: int,
        first: bool,
        flags: int = 0,
    ) -> None:
        handle, seq, completions = self._attachment.handle, transfer.seq, self._core.completions
        worker = self._attachment.worker
        options = SubmitOptions(completions, transfer.token, priority, mode=mode, flags=flags)
        memory, nbytes = buffer.memory, buffer.nbytes

        def submit() -> None:
            transfer.about_to_begin()
            status = function(handle, seq, memory, nbytes, options.options, transfer.job_place)
            if status < 0:
                transfer.refused()
            check(status, options.text)

        def submitted(_: Call) -> None:
            transfer.submitted()

        call = worker.make(submit, after=submitted)
        try:
            transfer.expect()
            worker.ask_for(call, first=first)
            await worker.outcome(call)
        except GeneratorExit:
            raise
        except BaseException:
            # Refused, cancelled, or a signal handler has raised: before the call, under it or
            # after it. Taken back if the thread has not begun with it, else its job is cancelled.
            try:
                call.take_back()
            finally:
                call.take_back()
            if not transfer.ended:
                await transfer.abort()
            raise

    # ---- Remove ---------------------------------------------------------------------------------

    async def remove(self, seq: int) -> None:
        """Empties a sequence, once the transfers of it that are in flight have ended."""
        self._check_usable()
        seq = sequence_id(seq)
        self._attachment.worker.check_awaitable()
        transfers = self._attachment.in_flight
        while waited_for := [each for each, of in transfers.items() if of == seq]:
            await self._core.completions.until_ended(waited_for[0])
        # No await in between: what is asked for from now on comes later on the context's thread.
        await self._attachment.worker.call(self._remove, seq)

    def _remove(self, seq: int) -> None:
        check(lib.kvf_llama_remove(self._attachment.handle, seq))
        if (llm := self._attachment.llm_of(seq)) is not None:
            llm.reset()

    # ---- Looking inside -------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Library and build, model, fingerprint and what that covers, kind of cache, default save
        mode, counters of the tap."""
        self._check_usable()
        description = describe(lib.kvf_llama_describe, self._attachment.handle)
        if self._variant:
            description["fingerprint"] += f"/{self._variant}"
            description["fingerprint_covers"].append("variant")
        return description

    def _check_usable(self) -> None:
        self._core.completions.check_usable()
        if self._attachment.detaching:
            raise error(lib.KVF_ERR_CLOSED, "detached")
        if self._attachment.owner is not None and _address(self._attachment.owner) is None:
            raise error(lib.KVF_ERR_CONTEXT_FREED)

    def __repr__(self) -> str:
        attachment = self._attachment
        condition = in_flight(len(attachment.in_flight))
        if attachment.detaching or self._core.closed:
            condition = "detached" if attachment not in self._core.attachments else "detaching"
        return f"<Llama at {attachment.address:#x}: {self._model}, {condition}>"

    # ---- Detaching ------------------------------------------------------------------------------

    async def detach(self) -> None:
        """Detaches once its transfers have ended; then the context may be freed.

        Cancelling the task that waits here cancels the transfers. Closing the engine detaches too.
        """
        self._attachment.worker.check_awaitable()
        self._attachment.detaching = True
        await see_through(self._take_down, self._cancel)

    def _cancel(self) -> None:
        for transfer in self._attachment.in_flight:
            transfer.cancel()

    async def _take_down(self) -> None:
        """Waits for what is in flight, then detaches. May be broken off and begun again."""
        core, attachment = self._core, self._attachment
        for transfer in list(attachment.in_flight):
            await core.completions.until_ended(transfer)
        if attachment not in core.attachments:
            return  # detached before, or by closing the engine
        end = attachment.end()
        await core.completions.until_ended(end)
        if attachment in core.attachments:
            core.attachments.remove(attachment)
        check(end.result)

    async def __aenter__(self) -> Llama:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.detach()


class SequenceTransfer(Transfer[T]):
    """A save or a load of one sequence."""

    def __init__(
        self,
        core: Core,
        attachment: Attachment,
        seq: int,
        buffer: Buffer,
        result: Callable[[Completion], T],
        *,
        writes_buffer: bool,
    ) -> None:
        super().__init__(core.completions, buffer, None, result, writes_buffer=writes_buffer)
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

    def __init__(
        self, core: Core, attachment: Attachment, seq: int, buffer: Buffer, fingerprint: str
    ) -> None:
        memory = buffer.memory
        super().__init__(
            core,
            attachment,
            seq,
            buffer,
            lambda done: self._snapshot(memory, done),
            writes_buffer=True,
        )
        self._fingerprint = fingerprint

    def _subject(self) -> str:
        return f"that saves sequence {self.seq}"

    def about_to_begin(self) -> None:
        if self._llm is not None:
            self._llm_state = self._llm.state()

    def _snapshot(self, memory: CData, done: Completion) -> Snapshot:
        return Snapshot(
            memory,
            done.bytes,
            fingerprint=self._fingerprint,
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
        core: Core,
        attachment: Attachment,
        seq: int,
        buffer: Buffer,
        llm_state: LlmState | None,
    ) -> None:
        super().__init__(core, attachment, seq, buffer, lambda _: None, writes_buffer=False)
        self._llm_state = llm_state

    def _subject(self) -> str:
        return f"that loads sequence {self.seq}"

    def expect(self) -> None:
        self._attachment.latest_loads[self.seq] = self
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


def attach(
    engine: Engine,
    core: Core,
    llm: object,
    library: str | None,
    allow_blocking: bool,
    variant: str,
) -> Llama:
    """``Engine.attach``."""
    address = _address(llm)
    if not address:
        raise error(lib.KVF_ERR_CONTEXT_FREED)
    text = ErrorText()
    name = ffi.NULL if library is None else ffi.new("char[]", library.encode())
    options = ffi.new(
        "kvf_llama_options *",
        {
            "size": ffi.sizeof("kvf_llama_options"),
            "flags": lib.KVF_LLAMA_ALLOW_BLOCKING if allow_blocking else 0,
            "library": name,
            "error": text.buffer,
            "error_size": ffi.sizeof(text.buffer),
        },
    )
    handle = ffi.new("kvf_llama *")
    context = ffi.cast("struct llama_context *", address)
    owner = None if isinstance(llm, int) else llm
    worker = context_worker(address, core.completions)
    try:
        # Other attachments may be using the context.
        with worker.exclusive():
            check(lib.kvf_llama_attach(core.handle, context, options, handle), text)
        attachment = Attachment(handle[0], address, worker, owner)
        llama = Llama(engine, core, attachment, variant)
    except BaseException:
        if handle[0]:
            worker.when_idle(functools.partial(lib.kvf_llama_detach, handle[0]), math.inf)
        worker.stop()
        raise
    core.attachments.append(attachment)  # from now on, closing the engine detaches
    return llama


def _address(llm: object) -> int | None:
    """The address of the context; None if it has been freed, as far as Python can tell."""
    context = getattr(llm, "ctx", llm)  # llama_cpp.Llama.ctx, None after Llama.close()
    if context is None or isinstance(context, int):
        return context
    if isinstance(context, (ctypes.c_void_p, ctypes._Pointer)):
        return ctypes.cast(context, ctypes.c_void_p).value
    raise TypeError(f"a llama_cpp.Llama, a ctypes pointer or an address, not {type(llm).__name__}")
