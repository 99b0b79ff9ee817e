"""A context with its prompts decoded, its buffers, and single transfers of its state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy
from numpy.typing import NDArray

from ... import Buffer, Completion, Engine, Llama, LoadMode, TraceEvent
from ..libllama import Context
from ..limits import Direction
from ..timeline import Timeline
from ..workload import Decoding, ended, submit
from .moved import BLOCK_TOKENS, Blocks, Moved, WholeState
from .raw import Raw

if TYPE_CHECKING:
    from ... import Priority

Memory = Literal["pinned", "pageable"]

SMALL = 3
"""A sequence for small transfers. Empty only where just one sequence has a prompt."""


@dataclass
class PreparedContext:
    """What the measurements of a stage use. Its calls are for the event loop's thread."""

    name: str
    engine: Engine
    llama: Llama
    context: Context
    decoding: Decoding
    nbytes: int
    pinned: Buffer
    pageable: NDArray[numpy.uint8]
    raw: Raw
    repeats: int
    prefill_ms: float
    prefill_tokens: int
    tokens: int
    """The length of the saved sequence."""
    device_bytes_taken: int | None = None
    """Bytes of device memory that the first transfers have taken."""
    timeline: Timeline | None = None
    pieces: list[TraceEvent] = field(default_factory=list)
    decodes_apart: bool = False
    """Whether prompts are decoded in parts that do not see each other: see ``append``."""
    _blocks: dict[Moved, Blocks] = field(default_factory=dict)

    async def transfer(
        self,
        direction: Direction,
        memory: Memory,
        priority: Priority,
        mode: LoadMode = "auto",
        moved: Moved = "state",
    ) -> Completion:
        completion, _ = await self.timed_transfer(direction, memory, priority, mode, moved)
        return completion

    async def timed_transfer(
        self,
        direction: Direction,
        memory: Memory,
        priority: Priority,
        mode: LoadMode = "auto",
        moved: Moved = "state",
    ) -> tuple[Completion, int]:
        """Returns the completion, and when the submitting call returned. Blocks are in pinned
        memory whatever ``memory`` says."""
        what: WholeState | Blocks
        if moved == "state":
            what = WholeState(self.llama, self.buffer(memory))
        else:
            what = await self.blocks(moved)
        if direction == "save":
            save, recorded_ns = await submit(self.llama, what.start_save(priority))
            what.end_save(await save.wait())
            return ended(save), recorded_ns
        load, recorded_ns = await submit(self.llama, what.start_load(priority, mode))
        await load.wait()
        return ended(load), recorded_ns

    async def append(self, seq: int, tokens: Sequence[int]) -> None:
        """Decodes more tokens of a sequence; apart where the shape of the stage says so."""
        if self.decodes_apart:
            await self.llama.run(self.context.decode_apart, seq, tokens, SMALL)
        else:
            await self.llama.run(self.context.decode, [(seq, token) for token in tokens])

    async def blocks(self, moved: Moved) -> Blocks:
        """Returns the blocks, which have been saved at least once."""
        if moved not in self._blocks:
            begin = 0
            if moved == "new tokens":
                begin = max(0, self.tokens - BLOCK_TOKENS)
            blocks = await Blocks.allocate(self.engine, self.llama, begin, self.tokens)
            save = await blocks.start_save("urgent")
            blocks.end_save(await save.wait())
            self._blocks[moved] = blocks
        return self._blocks[moved]

    def buffer(self, memory: Memory) -> Any:
        return self.pinned if memory == "pinned" else self.pageable

    def buffer_address(self, memory: Memory) -> int:
        array = self.pinned.numpy() if memory == "pinned" else self.pageable
        address: int = array.ctypes.data
        return address

    def drain_trace(self) -> list[TraceEvent]:
        events = self.engine.trace()
        self.pieces += events
        return events
