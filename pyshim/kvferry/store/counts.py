"""What a store counts, and how long its calls have taken.

Counting is always on: it takes about two microseconds a call. ``kvferry.metrics`` reads the numbers
when somebody asks for them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

Tier = Literal["ram", "disk", "remote"]
TIERS: tuple[Tier, ...] = ("ram", "disk", "remote")
"""From the nearest to the farthest."""

Reason = Literal["budget", "breaker_open", "damaged", "newer", "foreign", "slow", "failed", "hangs"]
"""Why a tier did not do what it was asked for.

budget
    There was no room within a limit.
breaker_open
    The tier is left alone for a while, after failures.
damaged
    A checksum, a length or a header was wrong.
newer
    A newer version of kvferry wrote it.
foreign
    It is of another context or of another part than its name says.
slow
    Bringing it takes longer than evaluating its tokens.
failed
    A system call or a request failed.
hangs
    A system call made no progress.
"""

Refusals = Counter[Reason]

BOUNDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
"""Of the buckets of a histogram, in seconds. A search in RAM takes a tenth of a millisecond; a read
of gigabytes from an object store takes seconds."""


class Histogram:
    """Counts how many times were in each bucket. One thread writes, any thread may read."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self._sum += seconds

    def read(self) -> tuple[list[int], float]:
        """Returns how many times were in each bucket, the last one without a bound, and the sum of
        the times."""
        return list(self._counts), self._sum


@dataclass
class Counts:
    """What the calls of a store have done. For the thread of the event loop."""

    requested_tokens: int = 0
    """Tokens for which ``restore`` has looked, without those that the sequence held."""
    hit_tokens: Counter[Tier] = field(default_factory=Counter)
    """Those of them that it has loaded, by the tier from which it took them."""
    restored_tokens: int = 0
    """All that it has loaded, also those that the sequence held."""
    kept_tokens: int = 0
    """Tokens that were kept when ``keep`` returned."""
    saved_bytes: int = 0
    """From contexts into RAM."""
    restored_bytes: int = 0
    """From RAM into contexts."""
    read_bytes: int = 0
    """From farther tiers into RAM, without headers."""
    slow: Counter[Tier] = field(default_factory=Counter)
    """Prefixes that were not brought, or not all of them, by their farthest tier: evaluating the
    tokens is faster."""
    refused_loads: int = 0
    """Loads that the library has refused, also where that tells the layout of a new context."""
    find_seconds: Histogram = field(default_factory=Histogram)
    keep_seconds: Histogram = field(default_factory=Histogram)
    restore_seconds: dict[Tier | None, Histogram] = field(
        default_factory=lambda: {tier: Histogram() for tier in (*TIERS, None)}
    )
    """By the farthest tier from which something was taken; None: nothing was restored."""

    def restored(self, requested: int, hits: Counter[Tier], seconds: float) -> None:
        """Counts a ``restore``. ``hits`` are tokens by tier."""
        self.requested_tokens += requested
        self.hit_tokens.update(hits)
        farthest = max(hits, key=TIERS.index, default=None)
        self.restore_seconds[farthest].observe(seconds)
