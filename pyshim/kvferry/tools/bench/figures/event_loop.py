"""Measurements of how long transfers keep the event loop from its other tasks."""

from __future__ import annotations

import gc
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import anyio
import anyio.lowlevel
import numpy

from ..measurement import Goal, Measurement, Reading
from ..prepared import Prepared

_STALL_BYTES = 256 << 20
_LONG_MS = 0.5


def longest_stall(goal: Goal) -> Measurement:
    """The longest time that a task that is always ready to run had to wait."""

    async def measure(prepared: Prepared) -> Reading:
        idle, busy = await _stalls_of(prepared)
        text = (
            f"{busy.long} of {busy.turns:,} turns over {_LONG_MS:g} ms; without transfers "
            f"{idle.longest_ms:.2f} ms"
        )
        return Reading(busy.longest_ms, text, {"idle_longest_ms": idle.longest_ms})

    return Measurement("longest stall of the event loop", "ms", goal, measure)


def longest_own_stall(goal: Goal) -> Measurement:
    """As ``longest_stall``, in processor time of the event loop's thread: without the time for
    which other threads have preempted it."""

    async def measure(prepared: Prepared) -> Reading:
        idle, busy = await _stalls_of(prepared)
        return Reading(busy.longest_own_ms, f"without transfers {idle.longest_own_ms:.2f} ms")

    name = "longest stall of the event loop, its own time"
    return Measurement(name, "ms", goal, measure)


async def _stalls_of(prepared: Prepared) -> tuple[_Stalls, _Stalls]:
    """Returns the stalls without transfers, and with saves and loads of 256 MiB in turn."""

    async def both() -> tuple[_Stalls, _Stalls]:
        source = numpy.ones(_STALL_BYTES, numpy.uint8)
        target = await prepared.engine.allocate(_STALL_BYTES)
        await prepared.engine.copy_out(source, target)
        await prepared.engine.copy_in(source, target)

        async def transfers() -> None:
            for _ in range(prepared.repeats):
                await prepared.engine.copy_out(source, target)
                await prepared.engine.copy_in(source, target)

        async def nothing() -> None:
            await anyio.sleep(0.5)

        return await _stalls(nothing), await _stalls(transfers)

    return await prepared.once("stalls", both)


@dataclass
class _Stalls:
    """The gaps between the turns of a task that is always ready to run.

    No list of all gaps: growing and collecting a million entries would be the longest stall.
    """

    turns: int = 0
    long: int = 0
    longest_ms: float = 0.0
    longest_own_ms: float = 0.0
    """Processor time of the event loop's thread."""


async def _stalls(work: Callable[[], Awaitable[None]]) -> _Stalls:
    stalls = _Stalls()
    done = anyio.Event()

    async def tick() -> None:
        last, last_ran = time.perf_counter_ns(), time.thread_time_ns()
        while not done.is_set():
            await anyio.lowlevel.checkpoint()
            now, ran = time.perf_counter_ns(), time.thread_time_ns()
            gap_ms = (now - last) / 1e6
            stalls.turns += 1
            stalls.long += gap_ms > _LONG_MS
            stalls.longest_ms = max(stalls.longest_ms, gap_ms)
            stalls.longest_own_ms = max(stalls.longest_own_ms, (ran - last_ran) / 1e6)
            last, last_ran = now, ran

    gc.collect()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(tick)
        await work()
        done.set()
    return stalls
