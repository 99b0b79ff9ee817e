"""A context with its prompts decoded, its buffers, and single transfers of its state."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy
from numpy.typing import NDArray

from ... import Buffer, Completion, Engine, Llama, LoadMode, TraceEvent
from ..libllama import Context
from ..limits import Direction
from ..timeline import Timeline
from ..workload import LOADED, SAVED, Decoding, ended
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
    device_bytes_taken: int | None = None
    """Bytes of device memory that the first transfers have taken."""
    timeline: Timeline | None = None
    pieces: list[TraceEvent] = field(default_factory=list)

    async def transfer(
        self,
        direction: Direction,
        memory: Memory,
        priority: Priority,
        mode: LoadMode = "auto",
    ) -> Completion:
        buffer = self.buffer(memory)
        if direction == "save":
            save = await self.llama.start_save(SAVED, into=buffer, priority=priority)
            await save.wait()
            return ended(save)
        load = await self.llama.start_load(buffer, LOADED, priority=priority, mode=mode)
        await load.wait()
        return ended(load)

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
