"""Measured speeds: of a tier that brings bytes, and of a model that evaluates tokens.

Other work on the machine makes a measurement slow at times, so that medians are taken, and nothing
is said before there are several.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

Clock = Callable[[], float]

_ENOUGH = 3
"""The first transfers also allocate memory, and find cold disks and connections."""
_RECENT = 7
"""How many measurements count. A speed that has changed is noticed after four of them."""
_AGAIN_SECONDS = 60.0
_AGAIN_LOSSES = 20
"""Trials may waste a twentieth of the time."""
_LEAST_TOKENS = 32
"""Prefills of fewer tokens take about as long as one of this many."""
_LONG_TOKENS = 256
"""Each token of a shorter prefill takes longer, so that short ones tell nothing of the depth."""


@dataclass(frozen=True)
class Line:
    """Seconds as a function of a size."""

    fixed: float
    each: float

    def at(self, size: float) -> float:
        return self.fixed + self.each * size


def _slope(points: Iterable[tuple[float, float]]) -> float | None:
    """The median of the slopes of all pairs (Theil and Sen's estimator), at least 0. None where too
    few of the pairs are far enough from one another."""
    known = list(points)
    slopes = [
        (later - earlier) / (large - small)
        for small, earlier in known
        for large, later in known
        if large >= 2 * small > 0
    ]
    return max(0.0, median(slopes)) if len(slopes) >= _ENOUGH else None


class TransferSpeed:
    """How long a tier takes: a latency, and seconds for each byte."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[int, float]] = deque(maxlen=_RECENT)
        self._latest = clock()
        self._on_trial = False

    def note(self, nbytes: int, seconds: float) -> None:
        """Takes a transfer that was measured. After ``begin_trial``, one that took less than half
        of what was expected makes everything before it void."""
        if nbytes <= 0 or seconds < 0:
            return
        if self._on_trial:
            self._on_trial = False
            expected = self.line()
            if expected is not None and seconds < expected.at(nbytes) / 2:
                self._seen.clear()
        self._seen.append((nbytes, seconds))
        self._latest = self._clock()

    def line(self) -> Line | None:
        """Seconds as a function of bytes: ``fixed`` is the latency. None: not seen often enough."""
        if len(self._seen) < _ENOUGH:
            return None
        each = _slope(self._seen)
        if each is None:  # sizes are too much alike to tell latency and bandwidth apart
            return Line(0.0, median(seconds / nbytes for nbytes, seconds in self._seen))
        return Line(max(0.0, median(s - each * nbytes for nbytes, s in self._seen)), each)

    def is_due(self, loss: float) -> bool:
        """Whether it is time for a trial, which takes ``loss`` seconds too long as it seems."""
        return self._clock() - self._latest >= max(_AGAIN_SECONDS, _AGAIN_LOSSES * loss)

    def begin_trial(self) -> None:
        """The next trial is due when this one has been measured, or was lost."""
        self._on_trial = True
        self._latest = self._clock()


class PrefillSpeed:
    """How long a model takes to evaluate tokens of a prompt.

    A token at depth d, with d tokens before it, takes a + b d seconds: its attention reads what is
    before it. Batches of few tokens and other load make tokens slower, nothing makes them faster:
    so the fastest of the recent measurements gives a. Where a store is of use, most prompts have
    few tokens left to evaluate: long prefills are remembered apart from short ones.
    """

    def __init__(self) -> None:
        self._short: deque[tuple[float, float]] = deque(maxlen=_RECENT)
        self._long: deque[tuple[float, float]] = deque(maxlen=_RECENT)

    @property
    def seen(self) -> list[tuple[float, float]]:
        """The recent measurements: mean depth, and seconds for a token."""
        return [*self._long, *self._short]

    def note(self, tokens: int, seconds: float, begin: int) -> None:
        """Takes the evaluation of ``tokens`` tokens at the positions from ``begin`` on."""
        if tokens >= _LEAST_TOKENS and seconds > 0:
            of_length = self._long if tokens >= _LONG_TOKENS else self._short
            of_length.append((begin + tokens / 2, seconds / tokens))

    def line(self) -> Line | None:
        """Seconds for a token as a function of its depth. None: not seen often enough."""
        if len(self.seen) < _ENOUGH:
            return None
        slope = _slope(self._long) or 0.0
        return Line(max(0.0, min(each - slope * depth for depth, each in self.seen)), slope)


def prefill_seconds(line: Line, begin: int, end: int) -> float:
    """Seconds for the tokens at [begin, end), by the ``line`` of a PrefillSpeed."""
    return (end - begin) * line.at((begin + end) / 2)


class Stopwatch:
    """The time during which at least one of several reads is under way."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._running = 0
        self._begin = 0.0
        self.seconds = 0.0
        self.nbytes = 0
        """The bytes of the reads that have succeeded."""

    @contextmanager
    def reading(self) -> Iterator[None]:
        if not self._running:
            self._begin = self._clock()
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self.seconds += self._clock() - self._begin
