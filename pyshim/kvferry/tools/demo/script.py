"""What is done to both contexts of a layout."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Literal

from ..libllama import Context
from ..workload import LOADED, Items

REPEATS = 5
"""How often a timed save or load is repeated; the figures are medians."""

SPARE = 320
"""Most tokens that sequence 1 grows by."""

_SIZE_QUERIES = 50

Event = int | Literal["save", "load"]
"""What was done to a context: the number of a decode step, or a transfer."""


def next_token(context: Context) -> Items:
    return [(LOADED, 1 % context.model.vocabulary)]


def median_us(call: Callable[[], object]) -> float:
    times = []
    for _ in range(_SIZE_QUERIES):
        begin = time.monotonic_ns()
        call()
        times.append(time.monotonic_ns() - begin)
    return statistics.median(times) / 1e3
