"""Runs a layout with kvferry: saves and loads, alone and beside decoding."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy
from numpy.typing import NDArray

from ... import Completion, Engine, Llama, Priority, Snapshot, TraceEvent
from ..libllama import Context, Step
from ..table import mib, ms
from ..timeline import Span, Timeline
from ..workload import LOADED, SAVED, Decoding, Items, ended, step_percentile, submit
from .layouts import Layout
from .script import REPEATS, SPARE, Event, median_us, next_token
from .turn import save_turn

_IDLE_STEPS = 6  # before each save and load beside decoding


@dataclass
class Ours:
    """The results of a layout with kvferry."""

    state: NDArray[numpy.uint8]
    state_by_llama: NDArray[numpy.uint8]
    """The state of the same sequence of the same context, by llama.cpp's own call."""
    resaved: NDArray[numpy.uint8]
    """The state of the loaded sequence."""
    logits: bytes
    script: list[Event]
    """What happened after the prompt, in order."""
    figures: dict[str, Any]
    timeline: Timeline


async def with_kvferry(
    layout: Layout,
    engine: Engine,
    llama: Llama,
    context: Context,
    items: Items,
    say: Callable[[str], None],
) -> Ours:
    say(f"decoding a prompt of {len(items)} tokens")
    prefill = await llama.run(context.decode, items)
    nbytes = llama.size(SAVED)
    size_query_us = median_us(lambda: llama.size(SAVED))

    say(f"saving {mib(nbytes)} MiB, alone and beside decoding")
    run = _Run(engine, llama, context, await engine.allocate(nbytes))
    for _ in range(REPEATS + 1):  # the first touches the memory
        await run.save("urgent")
    alone = run.saves[1:]
    run.saves.clear()
    turn = await save_turn(engine, llama, sum(seq == SAVED for seq, _ in items))
    idle, timeline = await _beside_decoding(run, layout.name)
    during = run.steps_during_transfers()
    beside = {
        "save_beside_decoding_ms": _median_ms(run.saves),
        "load_beside_decoding_ms": _median_ms(run.loads),
    }
    run.loads.clear()
    snapshot, reference = await _save_by_both(run, llama, context)
    for _ in range(REPEATS):
        await run.load(snapshot, "urgent")

    resaved = await llama.save(LOADED)
    await llama.run(context.decode, next_token(context))
    return Ours(
        state=snapshot.numpy().copy(),
        state_by_llama=reference,
        resaved=resaved.numpy().copy(),
        logits=context.logits(),
        script=run.script(),
        figures={
            "state_bytes": nbytes,
            **_figures_of_save(alone),
            **turn,
            "size_query_us": size_query_us,
            "load_ms": _median_ms(run.loads),
            **beside,
            "prefill_ms": prefill.ms,
            "prefill_tokens": len(items),
            **_figures_of_decoding(idle, during),
        },
        timeline=timeline,
    )


def _figures_of_save(saves: list[_Timed]) -> dict[str, Any]:
    completion = saves[-1].completion
    return {
        "fragments": completion.fragments,
        "segments": completion.segments,
        "save_mode": {1: "in_place", 2: "snapshot"}[completion.mode],
        "submit_ms": statistics.median(each.submit_ms for each in saves),
        "save_ms": _median_ms(saves),
    }


def _figures_of_decoding(idle: list[Step], during: list[Step]) -> dict[str, Any]:
    return {
        "decode_p50_ms": _both(idle, during, 50),
        "decode_p99_ms": _both(idle, during, 99),
        "decode_steps": {"idle": len(idle), "during_transfers": len(during)},
    }


async def _beside_decoding(run: _Run, name: str) -> tuple[list[Step], Timeline]:
    """Saves and loads beside decoding. Returns decode steps without transfers, and the last
    timeline."""
    idle: list[Step] = []
    for _ in range(REPEATS):
        # Measured in turn with the transfers: steps get slower as the sequence gets longer.
        idle += await run.decoding.several(_IDLE_STEPS)
        timeline = await run.beside_decoding(name)
    return idle, timeline


async def _save_by_both(
    run: _Run, llama: Llama, context: Context
) -> tuple[Snapshot, NDArray[numpy.uint8]]:
    """Saves a sequence by kvferry, and by llama.cpp's own call.

    Both states are of the same moment: decoding other sequences may take cells that have left a
    sliding window.
    """
    snapshot = await run.save("urgent")
    reference = numpy.empty(llama.size(SAVED), numpy.uint8)
    await llama.run(context.state_get, SAVED, reference.ctypes.data, reference.nbytes)
    return snapshot, reference


@dataclass(frozen=True)
class _Timed:
    """A transfer that has ended."""

    recorded_ns: int
    """When the submitting call returned: until then the layout was recorded."""
    completion: Completion

    def span(self, direction: Literal["save", "load"]) -> Span:
        done = self.completion
        return Span(direction, done.submitted_ns, self.recorded_ns, done.finished_ns)

    @property
    def submit_ms(self) -> float:
        return (self.recorded_ns - self.completion.submitted_ns) / 1e6

    @property
    def ms(self) -> float:
        """From the submitting call to the completion."""
        return (self.completion.finished_ns - self.completion.submitted_ns) / 1e6


class _Run:
    """The saves, loads and decode steps of one context, with their times."""

    def __init__(self, engine: Engine, llama: Llama, context: Context, buffer: Any) -> None:
        self._engine, self._llama, self._buffer = engine, llama, buffer
        self.decoding = Decoding(llama, context, SPARE - 1)
        self.saves: list[_Timed] = []
        self.loads: list[_Timed] = []
        self._transfers: list[tuple[int, Event]] = []
        self._intervals: list[tuple[int, int]] = []

    async def save(self, priority: Priority) -> Snapshot:
        start = self._llama.start_save(SAVED, into=self._buffer, priority=priority)
        transfer, recorded_ns = await submit(self._llama, start)
        snapshot = await transfer.wait()
        timed = _Timed(recorded_ns, ended(transfer))
        self.saves.append(timed)
        self._transfers.append((timed.completion.submitted_ns, "save"))
        return snapshot

    async def load(self, snapshot: Snapshot, priority: Priority) -> None:
        start = self._llama.start_load(snapshot, LOADED, priority=priority)
        transfer, recorded_ns = await submit(self._llama, start)
        await transfer.wait()
        timed = _Timed(recorded_ns, ended(transfer))
        self.loads.append(timed)
        self._transfers.append((timed.completion.submitted_ns, "load"))

    async def beside_decoding(self, name: str) -> Timeline:
        """Saves and loads in the background, with decode steps before, during and after that."""
        self._engine.trace()
        begin = time.monotonic_ns()
        async with self.decoding.running():
            await self.decoding.pass_steps(2)
            snapshot = await self.save("background")
            await self.decoding.pass_steps(2)
            await self.load(snapshot, "background")
            await self.decoding.pass_steps(2)
        end = time.monotonic_ns()
        save, load = self.saves[-1], self.loads[-1]
        for timed in (save, load):
            done = timed.completion
            self._intervals.append((done.submitted_ns, done.finished_ns))
        pieces: list[TraceEvent] = self._engine.trace()
        title = (
            f"{name}: {mib(save.completion.bytes)} MiB in {save.completion.fragments:,} fragments"
            f", saved in {ms(save.ms)} ms, loaded in {ms(load.ms)} ms"
        )
        spans = [save.span("save"), load.span("load")]
        return Timeline(title, begin, end, self.decoding.during(begin, end), spans, pieces)

    def steps_during_transfers(self) -> list[Step]:
        found = [self.decoding.during(begin, end) for begin, end in self._intervals]
        return list({step.begin_ns: step for steps in found for step in steps}.values())

    def script(self) -> list[Event]:
        """Returns steps and transfers in the order in which the context made them."""
        events: list[tuple[int, Event]] = [
            (step.begin_ns, index) for index, step in enumerate(self.decoding.steps)
        ]
        return [event for _, event in sorted(events + self._transfers, key=lambda pair: pair[0])]


def _median_ms(transfers: list[_Timed]) -> float:
    return statistics.median(each.ms for each in transfers)


def _both(idle: list[Step], during: list[Step], percent: float) -> dict[str, float | None]:
    """None where no step fell beside a transfer."""
    return {
        "idle": step_percentile(idle, percent),
        "during_transfers": step_percentile(during, percent),
    }
