"""Host memory and the cores that copy it."""

from __future__ import annotations

import os
import resource
import statistics

import numpy

from ... import Engine, Priority
from ..limits import memcpy_seconds
from ..workload import ended, seconds
from .finding import Finding

_COPIED = 128 << 20
_REPEATS = 5


def pinned_memory(engine: Engine) -> Finding:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = limit == resource.RLIM_INFINITY
    found = "no limit" if unlimited else f"RLIMIT_MEMLOCK {limit / 2**20:.0f} MiB"
    if any(each["kind"] == "cuda" for each in engine.describe()["devices"]):
        # cuMemHostRegister pins through the kernel driver, which does not count RLIMIT_MEMLOCK.
        meaning = (
            "the CUDA driver ignores this limit; Engine(pinned_limit=...) limits kvferry's pool"
        )
    else:
        meaning = "without a CUDA device nothing is pinned, and all memory is equally fast"
    return Finding("pinned memory", found, meaning, details={"bytes": None if unlimited else limit})


def cores() -> Finding:
    usable, present = len(os.sched_getaffinity(0)), os.cpu_count()
    if usable > 2:
        meaning = "enough to copy host memory beside decoding, if decoding leaves one core free"
    else:
        meaning = (
            "transfers of host memory and decoding share the cores: give llama.cpp one thread less "
            "than there are cores, because its threads spin while they wait for each other"
        )
    details = {"usable": usable, "present": present}
    return Finding("cores", f"{usable} of {present} usable", meaning, details=details)


def memcpy() -> Finding:
    source, target = (numpy.ones(_COPIED, numpy.uint8) for _ in range(2))
    speeds = {}
    for threads in sorted({1, 2, 4, len(os.sched_getaffinity(0))}):
        if threads <= len(os.sched_getaffinity(0)):
            times = [
                memcpy_seconds(target.ctypes.data, source.ctypes.data, _COPIED, threads)
                for _ in range(_REPEATS)
            ]
            speeds[threads] = _COPIED / statistics.median(times) / 1e9
    found = ", ".join(f"{speed:.1f} GB/s with {n}" for n, speed in speeds.items()) + " thread(s)"
    return Finding(
        "memcpy",
        found,
        "the limit for all transfers from host memory to host memory",
        details={"gb_per_s": {str(threads): speed for threads, speed in speeds.items()}},
    )


async def transfers(engine: Engine) -> Finding:
    source = numpy.ones(_COPIED, numpy.uint8)
    buffer = await engine.allocate(_COPIED)
    priorities: list[Priority] = ["urgent", "background"]
    speeds: dict[str, float] = {}
    for priority in priorities:
        saves, loads = [], []
        for _ in range(_REPEATS + 1):  # the first touches the buffer
            transfer = await engine.start_copy_out(source, buffer, priority=priority)
            await transfer.wait()
            saves.append(seconds(ended(transfer)))
            transfer = await engine.start_copy_in(source, buffer, priority=priority)
            await transfer.wait()
            loads.append(seconds(ended(transfer)))
        for direction, times in (("save", saves), ("load", loads)):
            speeds[f"{priority} {direction}"] = _COPIED / statistics.median(times[1:]) / 1e9
    found = ", ".join(f"{name} {speed:.1f} GB/s" for name, speed in speeds.items())
    meaning = (
        "host memory, copied by kvferry: urgent should be nearly as fast as memcpy with as many "
        "threads as the engine has; background uses one thread of low priority"
    )
    return Finding("transfers", found, meaning, details={"gb_per_s": speeds})
