"""The sequences of a llama.cpp context."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import anyio
import anyio.lowlevel

from . import sync
from ._bridge.arguments import HostMemory, sequence_id
from ._bridge.attachment import Attachment
from ._bridge.block_list import BlocksAllowed, block_tokens
from ._bridge.cancellation import await_to_end
from ._bridge.engine_core import EngineCore
from ._bridge.submission import (
    LoadMode,
    Priority,
    SaveMode,
    load_mode,
    save_mode,
    stream_handle,
)
from .block_transfer import (
    BlocksToSave,
    LoadBlocksTransfer,
    SaveBlocksTransfer,
    SaveCheckpointTransfer,
    SaveOfBlocks,
    pinned_each,
)
from .blocks import Block, BlocksToLoad, Checkpoint
from .buffer import Buffer, borrow, pinned
from .errors import BufferTooSmall, check
from .sequence_transfer import BufferSave, LoadOutcome, LoadTransfer, SaveTransfer, WrongSize
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

    @property
    def model_path(self) -> str | None:
        """The file of the model, where the attachment was made with a ``llama_cpp.Llama``."""
        llm = self._attachment.llm
        return None if llm is None else llm.model_path

    async def _evaluated(self, seq: int) -> tuple[int, float] | None:
        """For the store. As ``LlamaCppObject.evaluated``; None where no such object decodes the
        sequence."""
        self._attachment.check_usable()
        llm = self._attachment.llm_of(sequence_id(seq))
        return None if llm is None else await self._attachment.worker.call(llm.evaluated)

    async def allocate(self, nbytes: int) -> Buffer:
        """As ``Engine.allocate`` of the engine that this was made by."""
        return await self._core.on_memory_thread(pinned, nbytes)

    async def _allocate_each(self, sizes: Sequence[int]) -> list[Buffer]:
        """As ``allocate``, for several buffers: a call on another thread costs as much as a small
        buffer."""
        return await self._core.on_memory_thread(pinned_each, sizes)

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
        attachment = self._attachment
        return await self._start_save(
            seq,
            functools.partial(SaveTransfer, attachment, seq),
            attachment.measure,
            attachment.sizes,
            into=into,
            priority=priority,
            mode=number,
        )

    async def _start_save(
        self,
        seq: int,
        make: Callable[..., BufferSave[T]],
        measure: Callable[[int], int],
        measured: Mapping[int, int],
        *,
        into: HostMemory | None,
        priority: Priority,
        mode: int,
        after_stream: int | None = None,
    ) -> Transfer[T]:
        """Starts the save that ``make(buffer, pooled=...)`` returns. ``measured`` has what
        ``measure`` has returned the last time."""
        first = priority == "urgent"
        if into is not None:
            transfer = make(borrow(into, "into", writable=True), pooled=False)
            await transfer.submit(priority, mode, first=first, after_stream=after_stream)
            return transfer
        # Pinning new memory takes long, and must not keep the context's thread busy. So the buffer
        # is allocated first, by the size of the last save, and the size is checked on the thread.
        worker = self._attachment.worker
        expected, has_measured = measured.get(seq), False
        while True:
            if expected is None:
                expected = await worker.call(measure, seq, first=first)
                first = has_measured = True  # it has had its turn
            nbytes = expected + expected // 16 + 65536
            try:
                buffer = await self._core.on_memory_thread(pinned, nbytes)
            except MemoryError:
                if has_measured:
                    raise
                expected = None  # the sequence may be smaller now
                continue
            transfer = make(buffer, pooled=True)
            try:
                await transfer.submit(priority, mode, first=first, after_stream=after_stream)
            except WrongSize as wrong:
                expected = wrong.size
                first = has_measured = True  # likewise
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
        transfer = LoadTransfer(self._attachment, seq, [buffer], llm_state, self._latest_loads)
        await transfer.submit(priority, number, first=priority == "urgent", trust=trust)
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

    # ---- Blocks and checkpoints -----------------------------------------------------------------

    def blocks_allowed(self) -> tuple[BlocksAllowed, str]:
        """Returns what the cache allows, and in one line why not more, "" where blocks alone do.

        Blocks as ``size`` does. Raises EngineClosed, ContextFreed.
        """
        self._attachment.check_usable()
        return self._attachment.exclusively(self._attachment.blocks_allowed)

    async def blocks_allowed_async(self) -> tuple[BlocksAllowed, str]:
        """As ``blocks_allowed``, on the context's thread."""
        self._attachment.check_usable()
        return await self._attachment.worker.call(self._attachment.blocks_allowed)

    def block_size(self, tokens: int = 256) -> int:
        """Returns the size in bytes of a block of so many tokens at positions of their own.

        A block has more bytes where positions repeat (the patches of an image for a model with
        M-RoPE), and fewer where some are missing. Blocks as ``size`` does. Raises SequenceEmpty (no
        sequence has had cells yet), KvferryError (the cache does not allow blocks), EngineClosed,
        ContextFreed.
        """
        self._attachment.check_usable()
        tokens = block_tokens(tokens)
        return self._attachment.exclusively(self._attachment.measure_block, tokens)

    async def block_size_async(self, tokens: int = 256) -> int:
        """As ``block_size``, on the context's thread."""
        self._attachment.check_usable()
        tokens = block_tokens(tokens)
        return await self._attachment.worker.call(self._attachment.measure_block, tokens)

    def checkpoint_size(self, seq: int = 0) -> int:
        """Returns the size in bytes of a checkpoint of a sequence, if it were saved now.

        Blocks as ``size`` does. Raises SequenceEmpty, SequenceRange, KvferryError (the cache needs
        no checkpoints, or allows none), EngineClosed, ContextFreed.
        """
        self._attachment.check_usable()
        seq = sequence_id(seq)
        return self._attachment.exclusively(self._attachment.measure_checkpoint, seq)

    async def checkpoint_size_async(self, seq: int = 0) -> int:
        """As ``checkpoint_size``, on the context's thread."""
        self._attachment.check_usable()
        seq = sequence_id(seq)
        return await self._attachment.worker.call(self._attachment.measure_checkpoint, seq)

    async def save_blocks(
        self,
        seq: int = 0,
        begin: int = 0,
        end: int | None = None,
        *,
        tokens: int = 256,
        into: Sequence[HostMemory] | None = None,
        keys: Sequence[bytes] | None = None,
        parent: bytes | None = None,
        priority: Priority = "background",
        mode: SaveMode = "auto",
        after_stream: int | None = None,
    ) -> list[Block]:
        """Saves the tokens at the positions [begin, end) of a sequence, in blocks of ``tokens``.

        The tail that fills no block is a shorter block. Without ``end`` the last block ends with
        the sequence. All blocks are one transfer. The sequence stays as it is, and may be decoded
        further meanwhile. ``mode`` "auto" is "in_place"; in a cache with sliding windows it is
        "snapshot".

        ``into`` has writable contiguous memory for each block, of at least ``block_size`` bytes,
        which belongs to the Block until that is closed or collected. Without ``into`` each block
        gets a buffer of pinned memory from the pool. ``keys`` has the ``key`` of each Block;
        ``parent`` is the key of the block before the first one. ``after_stream`` is a CUDA stream:
        the transfer begins when the stream has done the work that it holds now.

        Cancelling is as for ``save``. Raises SequenceRange, SequenceEmpty (there is no token at the
        positions of a block), InvalidArgument, BufferTooSmall, PinnedLimit, EngineClosed,
        ContextFreed, KvferryError (the cache does not allow blocks), and Busy (a load into the
        sequence is in flight; or a transfer in flight, a Snapshot or a Block uses ``into``).
        """
        start = self.start_save_blocks(
            seq,
            begin,
            end,
            tokens=tokens,
            into=into,
            keys=keys,
            parent=parent,
            priority=priority,
            mode=mode,
            after_stream=after_stream,
        )
        return await start_and_wait(start)

    async def start_save_blocks(
        self,
        seq: int = 0,
        begin: int = 0,
        end: int | None = None,
        *,
        tokens: int = 256,
        into: Sequence[HostMemory] | None = None,
        keys: Sequence[bytes] | None = None,
        parent: bytes | None = None,
        priority: Priority = "background",
        mode: SaveMode = "auto",
        after_stream: int | None = None,
        each_block: bool = False,
    ) -> SaveBlocksTransfer:
        """As ``save_blocks``, but returns when the layout of the blocks has been recorded.

        With ``each_block``, ``SaveBlocksTransfer.block`` returns each block as soon as it is whole,
        while others are still moved.
        """
        attachment = self._attachment
        attachment.check_usable()
        seq = sequence_id(seq)
        number, stream = save_mode(mode), stream_handle(after_stream)
        asked = BlocksToSave.checked(begin, end, tokens, into, keys, parent)
        attachment.worker.check_awaitable()
        await anyio.lowlevel.checkpoint_if_cancelled()
        first = priority == "urgent"
        if end is None:
            spans = await attachment.worker.call(asked.spans, attachment, seq, first=first)
        else:
            spans = asked.spans(attachment, seq)
        sizes = attachment.known_block_sizes(spans)
        if asked.into is None and sizes is None:
            sizes = await attachment.worker.call(attachment.measure_blocks, spans, first=first)
        repeated = False
        while True:
            buffers = asked.borrowed()
            if buffers is None:
                buffers = await self._core.on_memory_thread(pinned_each, sizes)
            save = SaveOfBlocks(asked, spans, buffers)
            transfer = SaveBlocksTransfer(attachment, seq, save, buffers)
            try:
                await transfer.submit(
                    priority, number, first=first, after_stream=stream, each_block=each_block
                )
            except BufferTooSmall:
                if asked.into is not None or repeated:
                    raise
                # Positions repeat: only now is known how many cells a block has.
                sizes, repeated = save.sizes, True
                continue
            return transfer

    async def save_checkpoint(
        self,
        seq: int = 0,
        *,
        into: HostMemory | None = None,
        key: bytes | None = None,
        priority: Priority = "background",
        mode: SaveMode = "auto",
        after_stream: int | None = None,
    ) -> Checkpoint:
        """Saves the windows and recurrent layers of a sequence, as they are at its last position.

        Call this between two decodes of the sequence: what windows and recurrent layers held at an
        earlier position is gone. The save is by snapshot, so that decoding may go on when the save
        has started. ``into`` is as for ``save``, of at least ``checkpoint_size`` bytes; ``key`` is
        the ``key`` of the Checkpoint; ``after_stream`` is as for ``save_blocks``.

        Cancelling is as for ``save``. Raises as ``save``, and KvferryError (the cache needs no
        checkpoints, or allows none).
        """
        start = self.start_save_checkpoint(
            seq, into=into, key=key, priority=priority, mode=mode, after_stream=after_stream
        )
        return await start_and_wait(start)

    async def start_save_checkpoint(
        self,
        seq: int = 0,
        *,
        into: HostMemory | None = None,
        key: bytes | None = None,
        priority: Priority = "background",
        mode: SaveMode = "auto",
        after_stream: int | None = None,
    ) -> Transfer[Checkpoint]:
        """As ``save_checkpoint``, but returns when the snapshot has been taken."""
        attachment = self._attachment
        attachment.check_usable()
        seq = sequence_id(seq)
        number, stream = save_mode(mode), stream_handle(after_stream)
        attachment.worker.check_awaitable()
        await anyio.lowlevel.checkpoint_if_cancelled()
        return await self._start_save(
            seq,
            functools.partial(SaveCheckpointTransfer, attachment, seq, key=key),
            attachment.measure_checkpoint,
            attachment.checkpoint_sizes,
            into=into,
            priority=priority,
            mode=number,
            after_stream=stream,
        )

    async def load_blocks(
        self,
        blocks: Sequence[Block],
        seq: int,
        *,
        checkpoint: Checkpoint | None = None,
        priority: Priority = "background",
        mode: LoadMode = "auto",
        after_stream: int | None = None,
    ) -> None:
        """Loads blocks into a sequence, in place of what the sequence held.

        The first block begins where the sequence shall begin, and each other block where the one
        before it ends. ``checkpoint`` is the one at the end of the last block, where the cache
        needs checkpoints; where checkpoints stand alone, ``blocks`` is empty. Nothing is copied
        into one buffer.

        All are checked before libllama is called: the model, the positions, the structure, and the
        keys of those that have some. ``mode`` and ``load_outcome`` are as for ``load``, and so is
        what the sequence holds if this raises. ``after_stream`` is as for ``save_blocks``.

        Raises StateMismatch (another model or kind of cache; keys of several conversations),
        StateDamaged (also for other positions than the Block or Checkpoint says), InvalidArgument
        (misordered, overlapping, a gap; a checkpoint is missing, or given where none belongs),
        CacheFull, SequenceRange, EngineClosed, ContextFreed, KvferryError (one of them has been
        closed; the cache does not allow blocks), and Busy (a transfer of this sequence is in
        flight).
        """
        start = self.start_load_blocks(
            blocks,
            seq,
            checkpoint=checkpoint,
            priority=priority,
            mode=mode,
            after_stream=after_stream,
        )
        await start_and_wait(start)

    async def start_load_blocks(
        self,
        blocks: Sequence[Block],
        seq: int,
        *,
        checkpoint: Checkpoint | None = None,
        priority: Priority = "background",
        mode: LoadMode = "auto",
        after_stream: int | None = None,
    ) -> Transfer[None]:
        """As ``load_blocks``, but returns when llama.cpp has taken the cells and named all
        fragments."""
        attachment = self._attachment
        attachment.check_usable()
        seq = sequence_id(seq)
        number, stream = load_mode(mode), stream_handle(after_stream)
        self._latest_loads[seq] = None
        attachment.worker.check_awaitable()
        await anyio.lowlevel.checkpoint_if_cancelled()
        given = BlocksToLoad(blocks, checkpoint)
        given.check_model(attachment)
        transfer = LoadBlocksTransfer(attachment, seq, given, self._latest_loads)
        first = priority == "urgent"
        await transfer.submit(priority, number, first=first, after_stream=stream)
        return transfer

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
