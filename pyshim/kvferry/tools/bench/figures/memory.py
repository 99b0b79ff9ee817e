"""The memory that transfers take beyond the buffer and the cache."""

from __future__ import annotations

import gc
from pathlib import Path

from ...workload import SAVED
from ..measurement import Goal, Measurement, Reading
from ..prepared import Prepared


def host_memory(goal: Goal) -> Measurement:
    """How much the resident memory grows at most during a save into a resident buffer."""

    async def measure(prepared: Prepared) -> Reading:
        await prepared.llama.save(SAVED, into=prepared.pinned, priority="urgent")
        gc.collect()
        before = _reset_peak()
        await prepared.llama.save(SAVED, into=prepared.pinned, priority="urgent")
        grown = (_resident("VmHWM") - before) / 2**20
        return Reading(grown, f"during a save of {prepared.nbytes / 2**20:.0f} MiB")

    return Measurement("host memory beyond the buffer", "MiB", goal, measure)


def _reset_peak() -> int:
    # proc(5): writing 5 sets the peak resident set size to the current size.
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(key)


def device_memory(goal: Goal) -> Measurement:
    async def measure(prepared: Prepared) -> Reading:
        taken = prepared.device_bytes_taken
        if taken is None:
            raise LookupError("there is no device memory")
        return Reading(taken / 2**20, "taken by the first save and load, says cuMemGetInfo")

    return Measurement("device memory beyond the cache", "MiB", goal, measure)
