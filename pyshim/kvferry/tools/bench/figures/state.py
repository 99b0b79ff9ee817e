"""The bytes of a state, and how long it takes to ask for their number."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy

from ...workload import SAVED
from ..measurement import Goal, Measurement, Reading, at_least
from ..prepared import Prepared


def same_bytes() -> Measurement:
    """Whether the bytes are right: otherwise the other figures mean nothing."""

    async def measure(prepared: Prepared) -> Reading:
        await prepared.llama.save(SAVED, into=prepared.pinned, priority="urgent")
        address = prepared.pageable.ctypes.data
        await prepared.llama.run(prepared.context.state_get, SAVED, address, prepared.nbytes)
        equal = numpy.array_equal(prepared.pinned.numpy(), prepared.pageable)
        return Reading(float(equal), "the state, against llama.cpp's own call")

    return Measurement("bit-identical", "1 = yes", at_least(1), measure)


def size_query(goal: Goal) -> Measurement:
    async def measure(prepared: Prepared) -> Reading:
        llama, context = prepared.llama, prepared.context
        before = _tap_calls(llama.describe())
        ours: list[int] = []
        theirs: list[int] = []

        def timed(function: Callable[[int], int], times: list[int]) -> None:
            begin = time.perf_counter_ns()
            function(SAVED)
            times.append(time.perf_counter_ns() - begin)

        for _ in range(150):  # each of both is called first equally often
            timed(llama.size, ours)
            timed(context.state_size, theirs)
            timed(context.state_size, theirs)
            timed(llama.size, ours)
        calls = _tap_calls(llama.describe()) - before
        if calls:
            raise AssertionError(f"300 size queries have read {calls} tensors")
        our_us, their_us = statistics.median(ours) / 1e3, statistics.median(theirs) / 1e3
        text = f"{our_us:.1f} µs, llama.cpp {their_us:.1f} µs, both from Python; no tensor is read"
        return Reading(our_us - their_us, text, {"our_us": our_us, "native_us": their_us})

    return Measurement("size query beyond llama.cpp's own", "µs", goal, measure)


def _tap_calls(description: dict[str, object]) -> int:
    return int(str(description["recorded_calls"])) + int(str(description["passed_calls"]))
