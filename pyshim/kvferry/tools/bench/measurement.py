"""Measurements and their results."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

from .prepared import Prepared


@dataclass(frozen=True)
class Goal:
    bound: float
    sense: Literal["at least", "at most"]

    def met(self, value: float) -> bool:
        return value >= self.bound if self.sense == "at least" else value <= self.bound

    def __str__(self) -> str:
        return f"{'≥' if self.sense == 'at least' else '≤'} {self.bound:g}"


def at_least(bound: float) -> Goal:
    return Goal(bound, "at least")


def at_most(bound: float) -> Goal:
    return Goal(bound, "at most")


@dataclass(frozen=True)
class Reading:
    value: float | None
    """None where nothing was measured: then ``limit`` says why."""
    limit: str = ""
    """What the value was compared with, and the medians of a ratio, for people."""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    name: str
    unit: str
    goal: Goal | None
    measure: Callable[[Prepared], Awaitable[Reading]]


@dataclass(frozen=True)
class Stage:
    """A prepared context, and all measurements made in it."""

    name: str
    open: Callable[[], AbstractAsyncContextManager[Prepared]]
    measurements: list[Measurement]


@dataclass
class Result:
    """One line of the table."""

    stage: str
    name: str
    unit: str
    goal: str
    met: bool | None
    """None without a goal, if nothing was measured, or if the measurement failed."""
    value: float | None = None
    limit: str = ""
    error: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def result(stage: str, measurement: Measurement, reading: Reading) -> Result:
    goal = measurement.goal
    return Result(
        stage,
        measurement.name,
        measurement.unit,
        str(goal) if goal else "",
        None if goal is None or reading.value is None else goal.met(reading.value),
        reading.value,
        reading.limit,
        details=reading.details,
    )


def nothing_measured(why: str) -> Reading:
    return Reading(None, f"nothing measured: {why}")


def failure(stage: str, measurement: Measurement, error: str) -> Result:
    goal = measurement.goal
    return Result(
        stage, measurement.name, measurement.unit, str(goal) if goal else "", None, error=error
    )
