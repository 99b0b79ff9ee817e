"""The sequences of a llama.cpp context."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import anyio
import anyio.lowlevel

from . import sync
from ._bridge.arguments import HostMemory, sequence_id
from ._bridge.attachment import Attachment
from ._bridge.cancellation import await_to_end
from ._bridge.engine_core import EngineCore
from ._bridge.submission import (
    LoadMode,
    Priority,
    SaveMode,
    load_mode,
    save_mode,
)
from ._native import lib
from .buffer import borrow, pinned
from .errors import check
from .sequence_transfer import (
    LoadOutcome,
    LoadTransfer,
    PooledSaveTransfer,
    SaveTransfer,
    WrongSize,
)
from .snapshot import Snapshot, state_to_load, to_verify
from .transfer import Transfer, start_and_wait

P = ParamSpec("P")
T = TypeVar("T")


class Llama:
    """An attachment to a llama context, made by ``Engine.attach``.

    Everything that touches the context runs on one thread, which belongs to the context: the
    recording of transfers, and the program's own code, above all decoding, through ``run``. All
    attachments to a context share that thread, those of other engines too. While a program decodes
    on another thread, no method of these objects may run; transfers that have been started may
    go on.

    Code that ``run`` runs, and tasks that such code starts, must not await methods of this object
    or close its engine: the thread would wait for itself. Doing so raises RuntimeError.

    All methods are for the thread of the event loop.
    """

    def __init__(self, engine: object, core: EngineCore, attachment: Attachment) -> None:
        """For kvferry itself. This object keeps ``engine`` alive."""
        self._engine = engine
        self._core = core
        self._attachment = attachment
        self._latest_loads: dict[int, LoadTransfer | None] = {}
        """By sequence. None: the load was refused or cancelled before it was submitted."""

    @property
    def fingerprint(self) -> str:
        """Identifies the model, together with the ``variant`` that was passed to ``attach``.

        A hash of the model's description, size, number of parameters and metadata. A load refuses
        a Snapshot with another fingerprint, with StateMismatch.

        The hash does not cover what libllama does not tell: weights (two models that differ in
        nothing else have the same fingerprint), adapters, control vectors, the context's RoPE
        settings. Use ``variant`` for those. It does not cover types, streams and layout of the
        cache either: a state contains them, and a load refuses a state of another cache, also with
        StateMismatch.
        """
        return self._attachment.fingerprint

    # ---- The context's thread -------------------------------------------------------------------

    async def run(self, function: Callable[P, T], /, *arguments: P.args, **keywords: P.kwargs) -> T:
        """Runs a function on the context's thread; returns its result or raises its exception.

        For instance ``await llama.run(llm.eval, tokens)``. Calls run in the order in which they
        were asked for, except that urgent transfers go before calls that have not begun. If the
        task is cancelled, a call that has not begun is not made; a call that has begun is waited
        for. Raises EngineClosed, ContextFreed.
        """
        self._attachment.check_usable()
        self._attachment.worker.check_awaitable()
        await anyio.lowlevel.checkpoint_if_cancelled()
        call = functools.partial(function, *arguments, **keywords)
        return await self._attachment.worker.call(call)

    @property
    def sync(self) -> sync.Llama:
        """The same attachment with calls that block, for code on the context's thread.

        See ``kvferry.sync``.
        """
        return sync.Llama(self._engine, self._core, self._attachment)

    # ---- Size -----------------------------------------------------------------------------------

    def size(self, seq: int = 0) -> int:
        """Returns the size of a sequence's state in bytes; a few bytes if the sequence is empty.

        Reads no tensor. Blocks until the context's thread has ended its current call, at most a
        decode step: prefer ``size_async`` where the event loop must not stall. Raises
        SequenceRange, EngineClosed, ContextFreed.
        """
        return self._attachment.size(seq)

    async def size_async(self, seq: int = 0) -> int:
        """As ``size``, on the context's thread."""
        self._attachment.check_usable()
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
        """Saves a sequence, and returns its state when all bytes have been moved.

        The sequence stays as it is, and may be decoded further. ``mode`` says what else may be done
        to it meanwhile, and when a decode waits for the save. ``into`` is writable contiguous
        memory of at least ``size`` bytes, which belongs to the Snapshot until that is closed or
        collected; or None for pinned memory from the pool.

        If the task is cancelled, the transfer is cancelled too; the cancellation goes on after the
        transfer has ended, and nothing is saved.

        Raises SequenceRange, SequenceEmpty, BufferTooSmall, PinnedLimit, EngineClosed,
        ContextFreed, and Busy (a load into the sequence is in flight; or a transfer in flight or a
        Snapshot uses ``into``).
        """
        return await start_and_wait(self.start_save(seq, into=into, priority=priority, mode=mode))

    async def start_save(
        self,
        seq: int = 0,
        *,
        into: HostMemory | None = None,
        priority: Priority = "background",
        mode: SaveMode = "auto",
    ) -> Transfer[Snapshot]:
        """As ``save``, but returns when the layout of the sequence has been recorded."""
        self._attachment.check_usable()
        seq = sequence_id(seq)
        number = save_mode(mode)
        self._attachment.worker.check_awaitable()
        await anyio.lowlevel.checkpoint_if_cancelled()
        first = priority == "urgent"
        if into is not None:
            buffer = borrow(into, "into", writable=True)
            transfer = SaveTransfer(self._attachment, seq, buffer)
            await transfer.submit(lib.kvf_llama_save, priority, number, first=first)
            return transfer
        # Pinning new memory takes long, and must not keep the context's thread busy. So the buffer
        # is allocated first, by the size of the last save, and the size is checked on the thread.
        attachment = self._attachment
        expected, measured = attachment.sizes.get(seq), False
        while True:
            if expected is None:
                expected = await attachment.worker.call(attachment.measure, seq, first=first)
                first = measured = True  # it has had its turn
            nbytes = expected + expected // 16 + 65536
            try:
                buffer = await self._core.on_memory_thread(pinned, nbytes)
            except MemoryError:
                if measured:
                    raise
                expected = None  # the sequence may be smaller now
                continue
            transfer = PooledSaveTransfer(attachment, seq, buffer)
            try:
                await transfer.submit(lib.kvf_llama_save, priority, number, first=first)
            except WrongSize as wrong:
                expected = wrong.size
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
        """Loads a state into a sequence, in place of what the sequence held.

        Returns when all bytes have been moved. A decode of the sequence before that waits for the
        load, and blocks the context's thread; kvferry.h has a table of what else may be done.
        ``state`` is a Snapshot, or contiguous memory that holds a state and nothing else.
        ``verify`` first compares the checksum of a Snapshot.

        If this raises, ``load_outcome`` tells what the sequence holds. A load that was refused
        (StateMismatch, StateDamaged), or cancelled before it began, leaves it as it was. A load
        that failed, or was cancelled, after it had begun leaves it empty. A load that had ended
        before it could be cancelled leaves the loaded state.

        ``mode="ahead"`` is faster, and takes as much extra device memory as the state has bytes:
        the bytes go there while llama.cpp still takes cells and lists fragments, and from there to
        the cache. The engine keeps that memory for half a minute, for the next such load. Where
        there is not enough memory, or no CUDA device has the cache, the load is done in place.

        ``trust`` allows a state that kvferry cannot check: a state that kvferry has not saved, for
        a cache whose format it does not know (``describe`` says ``"opaque"``). Without ``trust``
        that raises StateDamaged. llama.cpp does not check what it loads: a damaged state may end
        the process, or leave cells that only clearing the memory frees.

        Raises StateMismatch, StateDamaged, CacheFull, SequenceRange, EngineClosed, ContextFreed,
        and Busy (a transfer of this sequence is in flight).
        """
        if verify:
            snapshot = to_verify(state)
            seq = sequence_id(seq)
            self._latest_loads[seq] = None
            await snapshot.verify()
        await start_and_wait(self.start_load(state, seq, priority=priority, mode=mode, trust=trust))

    async def start_load(
        self,
        state: HostMemory,
        seq: int,
        *,
        priority: Priority = "background",
        mode: LoadMode = "auto",
        trust: bool = False,
    ) -> Transfer[None]:
        """As ``load``, but returns when llama.cpp has taken the cells and named all fragments."""
        self._attachment.check_usable()
        seq = sequence_id(seq)
        number = load_mode(mode)
        self._latest_loads[seq] = None
        self._attachment.worker.check_awaitable()
        await anyio.lowlevel.checkpoint_if_cancelled()
        buffer, llm_state = state_to_load(state, self._attachment)
        transfer = LoadTransfer(self._attachment, seq, buffer, llm_state, self._latest_loads)
        first = priority == "urgent"
        await transfer.submit(lib.kvf_llama_load, priority, number, first=first, trust=trust)
        return transfer

    def load_outcome(self, seq: int) -> LoadOutcome | None:
        """Returns the outcome of this object's latest load into a sequence; None if there was none.

        After a load that was cancelled, call this before the next ``await``: another task may begin
        a load meanwhile.
        """
        loads = self._latest_loads
        if seq not in loads:
            return None
        transfer = loads[seq]
        return "unchanged" if transfer is None else transfer.outcome

    # ---- Remove ---------------------------------------------------------------------------------

    async def remove(self, seq: int) -> None:
        """Empties a sequence, after its transfers in flight have ended.

        Raises SequenceRange, EngineClosed, ContextFreed.
        """
        self._attachment.check_usable()
        seq = sequence_id(seq)
        self._attachment.worker.check_awaitable()
        transfers = self._attachment.in_flight
        while waited_for := [each for each, of in transfers.items() if of == seq]:
            await self._core.completions.until_ended(waited_for[0])
        # No await in between: a transfer that is started from now on comes later on the thread.
        await self._attachment.worker.call(self._attachment.remove, seq)

    # ---- Looking inside -------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Returns library and build, model, fingerprint and what it covers, kind and format of the
        cache, default save mode, counters of the tap."""
        self._attachment.check_usable()
        return self._attachment.describe()

    def __repr__(self) -> str:
        return f"<Llama {self._core.text_of(self._attachment)}>"

    # ---- Detaching ------------------------------------------------------------------------------

    async def detach(self) -> None:
        """Detaches after the attachment's transfers have ended; then the context may be freed.

        If the waiting task is cancelled, the transfers are cancelled too. Closing the engine
        detaches as well.
        """
        self._attachment.worker.check_awaitable()
        self._attachment.detaching = True
        await await_to_end(self._take_down, self._cancel)

    def _cancel(self) -> None:
        for transfer in self._attachment.in_flight:
            transfer.cancel()

    async def _take_down(self) -> None:
        """Waits for the transfers in flight, then detaches. May be interrupted and called again."""
        core, attachment = self._core, self._attachment
        for transfer in list(attachment.in_flight):
            await core.completions.until_ended(transfer)
        if attachment not in core.attachments:
            return  # detached before, or by closing the engine
        end = attachment.ask_for_detach()
        await core.completions.until_ended(end)
        if attachment in core.attachments:
            core.attachments.remove(attachment)
        check(end.result)

    async def __aenter__(self) -> Llama:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.detach()
