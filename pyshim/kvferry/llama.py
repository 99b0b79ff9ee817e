"""The sequences of a llama.cpp context."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import anyio
import anyio.lowlevel

from . import sync
from ._bridge.arguments import HostMemory, sequence_id
from ._bridge.attachment import Attachment
from ._bridge.cancellation import see_through
from ._bridge.core import Core
from ._bridge.submission import (
    LoadMode,
    Priority,
    SaveMode,
    SubmitOptions,
    load_mode,
    save_mode,
)
from ._bridge.worker import Call
from ._native import lib
from .buffer import Buffer, borrow, pinned
from .errors import check
from .sequence_transfer import (
    LoadOutcome,
    LoadTransfer,
    Misfit,
    PooledSaveTransfer,
    SaveTransfer,
    SequenceTransfer,
)
from .snapshot import Snapshot
from .transfer import Transfer, carried_out

if TYPE_CHECKING:
    from ._native import CData

P = ParamSpec("P")
T = TypeVar("T")


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

    def __init__(self, engine: object, core: Core, attachment: Attachment) -> None:
        """For kvferry itself. ``engine`` lives as long as this object."""
        self._engine = engine
        self._core = core
        self._attachment = attachment
        self._latest_loads: dict[int, LoadTransfer | None] = {}
        """By sequence; None for a load that was refused or cancelled before it was submitted."""

    @property
    def fingerprint(self) -> str:
        """Identity of the model, with the ``variant`` that ``attach`` was given.

        A hash of what libllama tells of the model: its description, size, number of parameters and
        metadata. A load refuses a Snapshot of another one with StateMismatch. It does not cover
        what libllama doesn't tell: weights (two models that differ in nothing else have one
        fingerprint), adapters, control vectors, the context's own settings of RoPE; for those there
        is ``variant``. Nor does it cover types, streams and layout of the cache: a state says them
        itself, and a load refuses one of another cache, likewise with StateMismatch.
        """
        return self._attachment.fingerprint

    # ---- The context's thread -------------------------------------------------------------------

    async def run(self, function: Callable[P, T], /, *arguments: P.args, **keywords: P.kwargs) -> T:
        """Runs the program's own code on the context's thread, in turn with everything else there.

        ``await llama.run(llm.eval, tokens)``. Transfers that are urgent go before it while it waits
        for its turn. A cancelled task waits for its end if it has begun.
        """
        self._attachment.check_usable()
        self._attachment.worker.check_awaitable()
        await anyio.lowlevel.checkpoint_if_cancelled()
        call = functools.partial(function, *arguments, **keywords)
        return await self._attachment.worker.call(call)

    @property
    def sync(self) -> sync.Llama:
        """The same in calls that block, for code on the context's thread: see ``kvferry.sync``."""
        return sync.Llama(self._engine, self._core, self._attachment)

    # ---- Size -----------------------------------------------------------------------------------

    def size(self, seq: int = 0) -> int:
        """Size of a sequence's state in bytes; moves none of it. A few bytes if it is empty.

        Blocks while the context's thread is at work, for up to a decode step: in an event loop
        that must not stall prefer ``size_async``. Raises SequenceRange, ContextFreed.
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
        self._attachment.check_usable()
        seq = sequence_id(seq)
        number = save_mode(mode)
        self._attachment.worker.check_awaitable()
        await anyio.lowlevel.checkpoint_if_cancelled()
        first = priority == "urgent"
        if into is not None:
            buffer = borrow(into, "into", writable=True)
            transfer = SaveTransfer(self._attachment, seq, buffer)
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
            nbytes = expected + expected // 16 + 65536
            try:
                buffer = await self._core.on_memory_thread(pinned, nbytes)
            except MemoryError:
                if measured:
                    raise
                expected = None  # it may have been larger then
                continue
            transfer = PooledSaveTransfer(attachment, seq, buffer)
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
            self._latest_loads[seq] = None
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
        self._attachment.check_usable()
        seq = sequence_id(seq)
        number = load_mode(mode)
        self._latest_loads[seq] = None
        self._attachment.worker.check_awaitable()
        await anyio.lowlevel.checkpoint_if_cancelled()
        buffer = borrow(state, "state")
        llm_state = None
        if isinstance(state, Snapshot):
            self._attachment.check_fingerprint(state.fingerprint)
            llm_state = state.llm
        transfer = LoadTransfer(self._attachment, seq, buffer, llm_state, self._latest_loads)
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
        loads = self._latest_loads
        if seq not in loads:
            return None
        transfer = loads[seq]
        return "unchanged" if transfer is None else transfer.outcome

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
        self._attachment.check_usable()
        seq = sequence_id(seq)
        self._attachment.worker.check_awaitable()
        transfers = self._attachment.in_flight
        while waited_for := [each for each, of in transfers.items() if of == seq]:
            await self._core.completions.until_ended(waited_for[0])
        # No await in between: what is asked for from now on comes later on the context's thread.
        await self._attachment.worker.call(self._attachment.remove, seq)

    # ---- Looking inside -------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Library and build, model, fingerprint and what that covers, kind of cache, default save
        mode, counters of the tap."""
        self._attachment.check_usable()
        return self._attachment.describe()

    def __repr__(self) -> str:
        return f"<Llama {self._core.text_of(self._attachment)}>"

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
        end = attachment.ask_for_detach()
        await core.completions.until_ended(end)
        if attachment in core.attachments:
            core.attachments.remove(attachment)
        check(end.result)

    async def __aenter__(self) -> Llama:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.detach()
