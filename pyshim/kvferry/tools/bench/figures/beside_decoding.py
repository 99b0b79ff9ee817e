"""Decoding beside background transfers, and transfers beside decoding."""

from __future__ import annotations

from collections.abc import Callable

from ...limits import Direction
from ...table import ms
from ...workload import step_percentile
from ..beside import Beside
from ..measurement import Goal, Measurement, Reading, nothing_measured
from ..moved import Moved, of_moved
from ..prepared import Prepared

_ROUNDS, _STEPS = 6, 40
"""Of decoding alone, and of decoding beside transfers: rounds, and steps of each round."""


def _beside(
    direction: Direction,
    name: str,
    unit: str,
    goal: Goal | None,
    of: Callable[[Beside], Reading],
    moved: Moved = "state",
) -> Measurement:
    async def measure(prepared: Prepared) -> Reading:
        return of(await prepared.beside(direction, _ROUNDS, _STEPS, moved))

    name = f"{name} beside a background {direction}{of_moved(moved)}"
    return Measurement(name, unit, goal, measure)


def decode_percentile(
    direction: Direction, percent: int, goal: Goal | None, moved: Moved = "state"
) -> Measurement:
    def of(beside: Beside) -> Reading:
        idle = step_percentile(beside.idle, percent)
        during = step_percentile(beside.during, percent)
        if idle is None:
            return nothing_measured("no decode step was idle")
        if during is None:
            return nothing_measured("no decode step fell beside a transfer")
        text = f"{ms(during)} ms of {len(beside.during)} steps, idle {ms(idle)} ms"
        details: dict[str, float] = {"idle_ms": idle, "during_ms": during}
        first = step_percentile(beside.first, percent)
        if first is not None:
            details["first_ms"] = first
            text += f"; first steps after recording +{100 * (first / idle - 1):.1f} %"
        details["steps"] = len(beside.during)
        paced = step_percentile(beside.paced, percent)
        if paced is not None:
            details["raw_paced_ms"] = paced
            text += f"; raw copies at that pace +{100 * (paced / idle - 1):.1f} %"
        return Reading(100 * (during / idle - 1), text, details)

    return _beside(direction, f"decode p{percent}", "% more", goal, of, moved)


def decode_loss(direction: Direction, goal: Goal | None) -> Measurement:
    """Tokens lost while there is always a transfer, with recording and waiting for the thread."""

    def of(beside: Beside) -> Reading:
        idle = len(beside.idle) / beside.idle_seconds
        busy = beside.busy_steps / beside.busy_seconds
        return Reading(100 * (1 - busy / idle), f"{busy:.1f} tokens/s, idle {idle:.1f}")

    return _beside(direction, "decoding lost", "% of tokens/s", goal, of)


def pacing_cost(direction: Direction, goal: Goal) -> Measurement:
    """Processor time of kvferry's threads for each second of background transfers."""

    def of(beside: Beside) -> Reading:
        wall = sum(done.finished_ns - done.submitted_ns for done in beside.transfers) / 1e9
        text = f"{beside.pump_seconds:.2f} s of processor time in {wall:.2f} s of transfers"
        return Reading(beside.pump_seconds / wall, text)

    return _beside(direction, "cores that pacing takes", "of a core", goal, of)


def background_speed(
    direction: Direction, goal: Goal | None, moved: Moved = "state"
) -> Measurement:
    async def measure(prepared: Prepared) -> Reading:
        beside = await prepared.beside(direction, _ROUNDS, _STEPS, moved)
        raw = (await prepared.transfers(direction, moved=moved)).raw_ms
        text = f"{ms(beside.moving_ms)} ms, raw {ms(raw)} ms alone"
        pace: dict[str, dict[str, int]] = {}
        for device in prepared.engine.describe()["devices"]:
            pace = device.get("background_pace", {}).get(direction, pace)
        if pace:
            found = (f"{p['queued']} x {p['bytes'] / 2**20:.1f}" for p in pace.values())
            text += f"; MiB queued: {' | '.join(found)} (runs, rows, gathered)"
        return Reading(raw / beside.moving_ms, text, {"pace": pace})

    name = f"background {direction}{of_moved(moved)} beside decoding"
    return Measurement(name, "of raw speed", goal, measure)
