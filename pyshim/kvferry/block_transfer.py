"""Saves and loads of blocks and checkpoints: the transfers of several buffers at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ._bridge.arguments import HostMemory, integer, invalid
from ._bridge.attachment import Attachment
from ._bridge.block_list import BlockList, Span, block_tokens, checked_key, checked_position
from ._bridge.block_list import span as checked_span
from ._bridge.cancellation import await_to_end
from ._bridge.completion_record import Completion
from ._bridge.completions import Pending
from ._bridge.llama_cpp_object import LlamaCppObject, LlmState
from ._native import lib
from .blocks import Block, BlocksToLoad, Checkpoint
from .buffer import Buffer, borrow, pinned
from .sequence_transfer import BufferSave, LoadTransfer, SequenceTransfer

if TYPE_CHECKING:
    from ._native import CData


@dataclass(frozen=True)
class BlocksToSave:
    """The arguments of a save of blocks, checked."""

    begin: int
    end: int | None
    tokens: int
    into: list[HostMemory] | None
    keys: list[bytes] | None
    parent: bytes | None

    @classmethod
    def checked(
        cls,
        begin: int,
        end: int | None,
        tokens: int,
        into: Sequence[HostMemory] | None,
        keys: Sequence[bytes] | None,
        parent: bytes | None,
    ) -> BlocksToSave:
        """Raises TypeError, InvalidArgument."""
        begin = checked_position("begin", begin)
        if end is not None:
            begin, end = checked_span(begin, end)
        return cls(
            begin,
            end,
            block_tokens(tokens),
            None if into is None else list(into),
            None if keys is None else [checked_key("keys", key) for key in keys],
            None if parent is None else checked_key("parent", parent),
        )

    def borrowed(self) -> list[Buffer] | None:
        """Returns the caller's memory for each block; None if the pool gives the memory."""
        if self.into is None:
            return None
        return [borrow(memory, "into", writable=True) for memory in self.into]

    def spans(self, attachment: Attachment, seq: int) -> list[Span]:
        """Returns the positions of each block. Must be called on the context's thread."""
        spans = attachment.spans(seq, self.begin, self.end, self.tokens)
        for name, given in (("into", self.into), ("keys", self.keys)):
            if given is not None and len(given) != len(spans):
                raise invalid(f"{name} has {len(given)} items for {len(spans)} blocks")
        return spans


class SaveOfBlocks:
    """One submission of a save of blocks into given buffers."""

    def __init__(self, asked: BlocksToSave, spans: Sequence[Span], buffers: Sequence[Buffer]):
        self._asked = asked
        self._spans = spans
        # These keep the memory alive, until the Block of it does.
        self._memories: list[CData | None] = [buffer.memory for buffer in buffers]
        self._list = BlockList(
            [
                (buffer.memory, buffer.nbytes, span)
                for buffer, span in zip(buffers, spans, strict=True)
            ]
        )

    @property
    def sizes(self) -> list[int]:
        """The bytes of each block. The submitting call sets them, also if it returns that a buffer
        is too small."""
        return self._list.sizes

    def llm_state(self, llm: LlamaCppObject) -> LlmState:
        """Returns the tokens of the blocks, as the ``llama_cpp.Llama`` knows them."""
        return llm.state(self._spans[0][0], self._spans[-1][1])

    def submit(self, attachment: Attachment, seq: int, options: CData, job: CData) -> int:
        """Calls ``kvf_llama_save_blocks``."""
        blocks = self._list
        return lib.kvf_llama_save_blocks(
            attachment.handle, seq, blocks.native, blocks.item_size, blocks.count, options, job
        )

    def saved(
        self, attachment: Attachment, done: Completion, llm_state: LlmState | None
    ) -> list[Block]:
        """Returns the blocks of a save that has succeeded."""
        return [self.block(index, attachment, done, llm_state) for index in range(len(self._spans))]

    def block(
        self, index: int, attachment: Attachment, done: Completion, llm_state: LlmState | None
    ) -> Block:
        """Returns a block that is whole."""
        begin, end = self._spans[index]
        keys: Sequence[bytes | None] = self._asked.keys or [None] * len(self._spans)
        return Block(
            self._memories[index],
            self._list.native[index].bytes,
            begin=begin,
            end=end,
            key=keys[index],
            parent=keys[index - 1] if index else self._asked.parent,
            fingerprint=attachment.fingerprint,
            completion=done,
            llm=llm_state and _part_of(llm_state, begin, end, self._spans[0][0]),
        )

    def drop_memory(self, index: int) -> None:
        """The Block of this memory keeps it alive from now on."""
        self._memories[index] = None


def _part_of(state: LlmState, begin: int, end: int, first: int) -> LlmState:
    """Returns the part for the positions [begin, end) of a state that begins at ``first``."""
    part = slice(begin - first, end - first)
    scores = None if state.scores is None else state.scores[part]
    return LlmState(state.tokens[part], scores, state.seed)


def pinned_each(engine: int, sizes: Sequence[int]) -> list[Buffer]:
    """Takes a buffer of each size from the pool of the engine with this handle. May block, as
    ``pinned`` does."""
    return [pinned(engine, nbytes) for nbytes in sizes]


class SaveBlocksTransfer(SequenceTransfer[list[Block]]):
    """A save of blocks of one sequence: a Transfer that also tells when each block is whole."""

    def __init__(
        self, attachment: Attachment, seq: int, save: SaveOfBlocks, buffers: Sequence[Buffer]
    ) -> None:
        super().__init__(attachment, seq, buffers, self._saved, writes_buffers=True)
        self._save: SaveOfBlocks | None = save
        self._blocks: list[Block | None] = [None] * len(buffers)
        self.parts = [Pending() for _ in buffers]

    @property
    def count(self) -> int:
        """The number of blocks."""
        return len(self._blocks)

    async def block(self, index: int) -> Block:
        """Waits until a block is whole; returns it, while others may still be moved.

        From then on the transfer does not use the block's memory: ``close`` of the Block frees it.
        ``wait`` returns the same Blocks. ``index`` counts from 0, and may be asked for in any
        order and any number of times. A save that was started without ``each_block`` tells of all
        blocks when it ends.

        If the waiting task is cancelled, the transfer is cancelled too, as with ``wait``. If the
        transfer ends before the block is whole, this raises what ``wait`` raises; blocks that were
        whole stay so.

        Raises TypeError and InvalidArgument for an index that no block has.
        """
        index = integer("index", index, most=self.count - 1)
        whole = self.parts[index]
        if not whole.ended:
            self._completions.check_waitable()
        broken = False

        async def attempt() -> None:
            await (self._until_over() if broken else self._completions.until_ended(whole))

        def on_break() -> None:
            nonlocal broken
            broken = True
            self.cancel()

        await await_to_end(attempt, on_break)
        block = self._blocks[index]
        return (await self.wait())[index] if block is None else block

    def _subject(self) -> str:
        return f"that saves blocks of sequence {self.seq}"

    def prepare(self) -> None:
        assert self._save is not None
        if self._llm is not None:
            self._llm_state = self._save.llm_state(self._llm)

    def submitting_call(self, options: CData, job: CData) -> int:
        assert self._save is not None
        return self._save.submit(self._attachment, self.seq, options, job)

    def part_completed(self, index: int, completion: Completion) -> None:
        self._make_block(index, completion)
        assert self._save is not None
        self._save.drop_memory(index)
        self._drop_buffer(index)

    def _make_block(self, index: int, done: Completion) -> Block:
        """Returns the block, and makes it if this has not been done."""
        block = self._blocks[index]
        if block is None:
            assert self._save is not None
            block = self._save.block(index, self._attachment, done, self._llm_state)
            self._blocks[index] = block
        return block

    def _saved(self, done: Completion) -> list[Block]:
        return [self._make_block(index, done) for index in range(self.count)]

    def _drop_memory(self) -> None:
        super()._drop_memory()
        self._save = None


class SaveCheckpointTransfer(BufferSave[Checkpoint]):
    """A save of the checkpoint of one sequence."""

    _position = -1

    def __init__(
        self, attachment: Attachment, seq: int, buffer: Buffer, *, pooled: bool, key: bytes | None
    ) -> None:
        """Raises TypeError for a key of another type."""
        super().__init__(attachment, seq, buffer, pooled=pooled)
        self._key = None if key is None else checked_key("key", key)

    def _subject(self) -> str:
        return f"that saves a checkpoint of sequence {self.seq}"

    def prepare(self) -> None:
        super().prepare()
        self._position = self._attachment.last_position(self.seq)

    def submitting_call(self, options: CData, job: CData) -> int:
        return lib.kvf_llama_save_checkpoint(
            self._attachment.handle, self.seq, self._memory, self._nbytes, options, job
        )

    def _measure(self) -> int:
        return self._attachment.measure_checkpoint(self.seq)

    def _saved(self, done: Completion) -> Checkpoint:
        return Checkpoint(
            self._memory,
            done.bytes,
            position=self._position,
            key=self._key,
            fingerprint=self._attachment.fingerprint,
            completion=done,
            llm=self._llm_state,
        )


class LoadBlocksTransfer(LoadTransfer):
    """A load of blocks, and of a checkpoint where one is needed, into one sequence."""

    def __init__(
        self,
        attachment: Attachment,
        seq: int,
        given: BlocksToLoad,
        latest_loads: dict[int, LoadTransfer | None],
    ) -> None:
        super().__init__(attachment, seq, given.parts, given.llm, latest_loads)
        self._given: BlocksToLoad | None = given

    def _subject(self) -> str:
        return f"that loads blocks into sequence {self.seq}"

    def submitting_call(self, options: CData, job: CData) -> int:
        assert self._given is not None
        return self._given.submit(self._attachment.handle, self.seq, options, job)

    def _drop_memory(self) -> None:
        super()._drop_memory()
        self._given = None
