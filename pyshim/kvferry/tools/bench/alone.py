"""Transfers alone on the machine, timed: by kvferry, by plain copying, by llama.cpp's own calls."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import anyio

from ... import Completion, LoadMode
from ..._native import lib
from ..libllama import LlamaError
from ..limits import Direction
from ..workload import LOADED, SAVED, seconds
from .context import Memory, PreparedContext
from .moved import Moved


@dataclass(frozen=True)
class Samples:
    """The seconds of one transfer in several ways, which were measured in turn."""

    ours: list[float]
    """From the submitting call to the completion."""
    moving: list[float]
    """From the first piece to the completion, without recording the layout."""
    raw: list[float]
    completions: list[Completion]
    held: list[float]
    """From the submitting call to its return: for so long the context's thread is held."""

    @property
    def completion(self) -> Completion:
        return self.completions[-1]

    @property
    def listing_ms(self) -> float:
        """How long libllama works before it names the first fragment."""
        return statistics.median((c.listed_ns - c.submitted_ns) / 1e6 for c in self.completions)

    @property
    def naming_ms(self) -> float:
        """How long libllama names fragments, from the first to the last."""
        return statistics.median((c.recorded_ns - c.listed_ns) / 1e6 for c in self.completions)

    @property
    def our_ms(self) -> float:
        return statistics.median(self.ours) * 1e3

    @property
    def moving_ms(self) -> float:
        return statistics.median(self.moving) * 1e3

    @property
    def held_ms(self) -> float:
        return statistics.median(self.held) * 1e3

    @property
    def raw_ms(self) -> float:
        return statistics.median(self.raw) * 1e3


async def time_transfers(
    prepared: PreparedContext,
    direction: Direction,
    memory: Memory,
    mode: LoadMode,
    moved: Moved = "state",
) -> Samples:
    """Times urgent transfers in turn with raw copies of as many bytes. ``mode`` is the mode of
    loads."""
    ours, moving, raw, held = [], [], [], []
    completions: list[Completion] = []
    copy = prepared.raw.save_seconds if direction == "save" else prepared.raw.load_seconds
    for index in range(prepared.repeats + 1):
        completion, recorded_ns = await prepared.timed_transfer(
            direction, memory, "urgent", mode, moved
        )
        nbytes = min(completion.bytes, prepared.nbytes)
        raw_seconds = await anyio.to_thread.run_sync(copy, nbytes)
        if mode == "ahead" and completion.mode != lib.KVF_LOAD_AHEAD:
            raise LlamaError("device memory is too short for a load ahead")
        if index:  # the first round is the warm-up
            ours.append(seconds(completion))
            moving.append((completion.finished_ns - completion.started_ns) / 1e9)
            raw.append(raw_seconds)
            completions.append(completion)
            held.append((recorded_ns - completion.submitted_ns) / 1e9)
    return Samples(ours, moving, raw, completions, held)


async def time_native(prepared: PreparedContext, direction: Direction, memory: Memory) -> float:
    """Returns the milliseconds of llama.cpp's own call, the median of several."""
    address = prepared.buffer_address(memory)
    call = prepared.context.state_get if direction == "save" else prepared.context.state_set
    seq = SAVED if direction == "save" else LOADED
    times: list[float] = []
    begin = time.monotonic()
    # With half a million fragments a call takes seconds: then one timed call is enough.
    while len(times) <= prepared.repeats and (len(times) < 2 or time.monotonic() - begin < 5):
        started = time.monotonic()
        done = await prepared.llama.run(call, seq, address, prepared.nbytes)
        times.append(time.monotonic() - started)
        if not done:
            raise LlamaError(f"llama.cpp's own {direction} failed")
    return statistics.median(times[1:]) * 1e3
