"""Decoding beside background transfers that follow one another."""

from __future__ import annotations

import bisect
import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import anyio

from ... import Completion, TraceEvent
from ..libllama import Step
from ..limits import Direction, Pace
from ..timeline import Span, Timeline
from ..workload import Decoding
from .context import PreparedContext
from .moved import Moved


@dataclass(frozen=True)
class Beside:
    """Decoding beside background transfers."""

    idle: list[Step]
    during: list[Step]
    """Steps that overlapped a transfer, without those in ``first``."""
    first: list[Step]
    """The first step after each submitting call. Recording has evicted data from the processor's
    caches, and the device was idle, which costs these steps time."""
    idle_seconds: float
    """Wall time of the idle steps, with the gaps between them."""
    busy_steps: int
    busy_seconds: float
    """Wall time of transfers one after the other, in which ``busy_steps`` steps were decoded."""
    transfers: list[Completion]
    pump_seconds: float
    """Processor time of kvferry's threads during the transfers."""
    paced: list[Step]
    """Steps beside raw copies of the same size and pace as kvferry's background copies."""

    @property
    def moving_ms(self) -> float:
        """From the first piece to the completion."""
        return statistics.median((c.finished_ns - c.started_ns) / 1e6 for c in self.transfers)


@dataclass(frozen=True)
class _Busy:
    """A round of decoding beside transfers."""

    begin_ns: int
    end_ns: int
    steps: int
    """How many steps were decoded."""
    spans: list[Span]
    transfers: list[Completion]
    pump_seconds: float
    pieces: list[TraceEvent]


async def decode_beside(
    prepared: PreparedContext, direction: Direction, rounds: int, steps: int, moved: Moved
) -> Beside:
    """Decodes ``rounds`` times ``steps`` steps alone, and as many while there is always a
    background transfer in flight.

    Both are done in turn, so that changes of the machine's speed affect both alike. Each round
    starts with the same length of the sequence.
    """
    decoding = prepared.decoding
    idle: list[Step] = []
    idle_seconds = 0.0
    busy: list[_Busy] = []
    paced: list[Step] = []
    await prepared.transfer("save", "pinned", "background", moved=moved)  # the warm-up
    await decoding.several(3)
    for _ in range(rounds):
        await decoding.rewind()
        begin = time.monotonic()
        idle += await decoding.several(steps)
        idle_seconds += time.monotonic() - begin
        await decoding.rewind()
        busy.append(await _busy_round(prepared, direction, steps, moved))
        await decoding.rewind()
        paced += await _beside_raw(prepared, direction, steps)
    if direction == "save":
        _keep_timeline(prepared, busy[-1])
    during, first = _steps_beside(decoding, [span for each in busy for span in each.spans])
    return Beside(
        idle=idle,
        during=during,
        first=first,
        idle_seconds=idle_seconds,
        busy_steps=sum(each.steps for each in busy),
        busy_seconds=sum((each.end_ns - each.begin_ns) / 1e9 for each in busy),
        transfers=[done for each in busy for done in each.transfers],
        pump_seconds=sum(each.pump_seconds for each in busy),
        paced=paced,
    )


async def _busy_round(
    prepared: PreparedContext, direction: Direction, steps: int, moved: Moved
) -> _Busy:
    """Makes background transfers, one after the other, until ``steps`` steps are decoded."""
    decoding = prepared.decoding
    spans: list[Span] = []
    transfers: list[Completion] = []
    prepared.drain_trace()
    first, begin_ns, begin_pump = len(decoding.steps), time.monotonic_ns(), own_seconds()
    async with decoding.running():
        while len(decoding.steps) < first + steps and decoding.left > 0:
            done, recorded_ns = await prepared.timed_transfer(
                direction, "pinned", "background", moved=moved
            )
            spans.append(Span(direction, done.submitted_ns, recorded_ns, done.finished_ns))
            transfers.append(done)
    pump_seconds = own_seconds() - begin_pump
    end_ns = time.monotonic_ns()
    decoded = len(decoding.steps) - first
    pieces = prepared.drain_trace()
    return _Busy(begin_ns, end_ns, decoded, spans, transfers, pump_seconds, pieces)


def _steps_beside(decoding: Decoding, spans: list[Span]) -> tuple[list[Step], list[Step]]:
    """Returns ``during`` and ``first`` of Beside. Each step is once in one of them."""
    begins = [step.begin_ns for step in decoding.steps]
    at = (bisect.bisect_left(begins, span.recorded_ns) for span in spans)
    first = {begins[index]: decoding.steps[index] for index in at if index < len(begins)}
    during = {
        step.begin_ns: step
        for span in spans
        for step in decoding.during(span.submitted_ns, span.finished_ns)
        if step.begin_ns not in first
    }
    return list(during.values()), list(first.values())


async def _beside_raw(prepared: PreparedContext, direction: Direction, steps: int) -> list[Step]:
    """Decodes beside raw copies at the pace that kvferry has found."""
    if prepared.raw.paced is None:
        return []
    device = prepared.engine.describe()["devices"][1]
    found = device["background_pace"][direction]["runs"]
    pace, stop = Pace(found["bytes"], found["queued"]), threading.Event()
    copying = threading.Thread(target=prepared.raw.paced, args=(direction, pace, stop))
    copying.start()
    try:
        return await prepared.decoding.several(steps)
    finally:
        stop.set()
        await anyio.to_thread.run_sync(copying.join)


def _keep_timeline(prepared: PreparedContext, last: _Busy) -> None:
    """Keeps the first three transfers of the last round."""
    shown = last.spans[:3]
    if not shown:
        return
    end_ns = min(last.end_ns, shown[-1].finished_ns + (last.end_ns - last.begin_ns) // 50)
    prepared.timeline = Timeline(
        f"{prepared.name}: {prepared.nbytes / 2**20:.0f} MiB, background saves one after the other",
        last.begin_ns,
        end_ns,
        prepared.decoding.during(last.begin_ns, end_ns),
        shown,
        last.pieces,
    )


def own_seconds() -> float:
    """Returns the processor time of kvferry's threads so far."""
    total = 0
    for task in Path("/proc/self/task").iterdir():
        try:
            if (task / "comm").read_text().startswith("kvf-"):
                total += int((task / "schedstat").read_text().split()[0])
        except FileNotFoundError:
            pass  # a thread that has ended
    return total / 1e9
