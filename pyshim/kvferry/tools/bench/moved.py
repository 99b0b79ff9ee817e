"""What the transfers of the benchmark move: a whole state, or blocks of it."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, Literal

from ... import Block, Buffer, Engine, Llama, LoadMode, Transfer
from ..libllama import LlamaError
from ..workload import LOADED, SAVED

if TYPE_CHECKING:
    from ... import Priority

Moved = Literal["state", "blocks", "new tokens"]
"""``state``: the whole state of the saved sequence, in one buffer. ``blocks``: the same tokens in
blocks. ``new tokens``: the last block alone, as if its tokens were new."""

BLOCK_TOKENS = 256


def of_moved(moved: Moved) -> str:
    """What the name of a figure says of what is moved; nothing for a state."""
    return "" if moved == "state" else f" of {moved}"


class Blocks:
    """Blocks of consecutive tokens of the saved sequence, each in a pinned buffer of its own."""

    def __init__(self, llama: Llama, begin: int, end: int, buffers: list[Buffer]) -> None:
        self._llama, self._begin, self._end, self._buffers = llama, begin, end, buffers
        self.nbytes = sum(len(buffer) for buffer in buffers)
        self.saved: list[Block] = []
        """The blocks of the last save."""

    @classmethod
    async def allocate(cls, engine: Engine, llama: Llama, begin: int, end: int) -> Blocks:
        """Raises LlamaError where a cache does not allow blocks alone."""
        allowed, reason = await llama.blocks_allowed_async()
        if not allowed.blocks or allowed.checkpoints:
            raise LlamaError(f"this cache does not allow blocks alone: {reason}")
        counts = [min(BLOCK_TOKENS, end - first) for first in range(begin, end, BLOCK_TOKENS)]
        sizes = {count: await llama.block_size_async(count) for count in set(counts)}
        buffers = [await engine.allocate(sizes[count]) for count in counts]
        return cls(llama, begin, end, buffers)

    def start_save(self, priority: Priority) -> Awaitable[Transfer[Any]]:
        for block in self.saved:
            block.close()  # the save goes to the same memory
        self.saved = []
        return self._llama.start_save_blocks(
            SAVED,
            self._begin,
            self._end,
            tokens=BLOCK_TOKENS,
            into=self._buffers,
            priority=priority,
        )

    def start_load(self, priority: Priority, mode: LoadMode) -> Awaitable[Transfer[None]]:
        return self._llama.start_load_blocks(self.saved, LOADED, priority=priority, mode=mode)

    def end_save(self, result: Any) -> None:
        self.saved = result


class WholeState:
    """The state of the saved sequence, in one buffer."""

    def __init__(self, llama: Llama, buffer: Any) -> None:
        self._llama, self._buffer = llama, buffer

    def start_save(self, priority: Priority) -> Awaitable[Transfer[Any]]:
        return self._llama.start_save(SAVED, into=self._buffer, priority=priority)

    def start_load(self, priority: Priority, mode: LoadMode) -> Awaitable[Transfer[None]]:
        return self._llama.start_load(self._buffer, LOADED, priority=priority, mode=mode)

    def end_save(self, result: Any) -> None:
        result.close()  # the next save goes to the same memory
