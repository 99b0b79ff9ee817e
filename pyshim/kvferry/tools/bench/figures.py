"""The measurements: each has a name, a unit, a goal, and a function of a prepared context.

All of them can be made on the host and on CUDA. The limit of speed is memcpy on the host, and the
raw pinned copy on CUDA.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import numpy

from ... import LoadMode
from ..limits import Direction
from ..table import ms
from ..workload import SAVED, ended, step_percentile
from .measurement import Goal, Measurement, Reading, at_least, nothing_measured
from .prepared import SMALL, Beside, Prepared

# Of decoding alone, and of decoding beside transfers: rounds, and steps of each round.
_ROUNDS, _STEPS = 6, 40


# ---- Speed alone on the machine ------------------------------------------------------------------


def of_raw(direction: Direction, goal: Goal, interleaved: int = 1) -> Measurement:
    """Speed while bytes move, compared with raw copies. ``beyond_raw`` includes the recording.

    ``interleaved`` is the number of sequences whose rows alternate. If there are several, the time
    of as many raw copies of rows is shown too.
    """

    async def measure(prepared: Prepared) -> Reading:
        samples = await prepared.transfers(direction)
        gb_per_s = prepared.nbytes / samples.moving_ms / 1e6
        text = f"{ms(samples.moving_ms)} ms, raw {ms(samples.raw_ms)} ms; {gb_per_s:.1f} GB/s"
        if interleaved > 1:
            width = prepared.nbytes // samples.completion.fragments
            copies = samples.completion.segments
            rows = prepared.raw.rows_seconds(direction, width, interleaved * width, copies)
            if rows is not None:
                text += f"; {copies} raw copies of rows {ms(rows * 1e3)} ms"
        return Reading(
            samples.raw_ms / samples.moving_ms,
            text,
            {
                "moving_ms": samples.moving_ms,
                "our_ms": samples.our_ms,
                "raw_ms": samples.raw_ms,
                "fragments": samples.completion.fragments,
                "segments": samples.completion.segments,
            },
        )

    return Measurement(f"urgent {direction}", "of raw speed", goal, measure)


def beyond_raw(direction: Direction, goal: Goal | None, mode: LoadMode = "auto") -> Measurement:
    """Milliseconds from the submitting call to the completion, less those of a raw copy."""

    async def measure(prepared: Prepared) -> Reading:
        samples = await prepared.transfers(direction, mode=mode)
        return Reading(
            samples.our_ms - samples.raw_ms,
            f"{ms(samples.our_ms)} ms, raw {ms(samples.raw_ms)} ms; libllama lists for "
            f"{ms(samples.listing_ms)} ms, names for {ms(samples.naming_ms)} ms"
            + (f"; {prepared.nbytes >> 20} MiB of device memory" if mode == "ahead" else ""),
            {"listing_ms": samples.listing_ms, "naming_ms": samples.naming_ms},
        )

    name = f"submit to completion of a {_name(direction, mode)}, beyond raw"
    return Measurement(name, "ms", goal, measure)


def _name(direction: Direction, mode: LoadMode) -> str:
    return f"{direction} ahead" if mode == "ahead" else direction


def against_native(direction: Direction, goal: Goal | None, mode: LoadMode = "auto") -> Measurement:
    """Compares with llama.cpp's own call, into pinned or pageable memory, whichever is faster."""

    async def measure(prepared: Prepared) -> Reading:
        samples = await prepared.transfers(direction, mode=mode)
        pinned = await prepared.native(direction, "pinned")
        pageable = await prepared.native(direction, "pageable")
        return Reading(
            min(pinned, pageable) / samples.our_ms,
            f"{ms(samples.our_ms)} ms, llama.cpp {ms(pinned)} pinned, {ms(pageable)} pageable",
            {"our_ms": samples.our_ms, "native_ms": {"pinned": pinned, "pageable": pageable}},
        )

    name = f"{_name(direction, mode)} against llama.cpp's best"
    return Measurement(name, "times as fast", goal, measure)


def pageable_against_native(direction: Direction, goal: Goal) -> Measurement:
    async def measure(prepared: Prepared) -> Reading:
        samples = await prepared.transfers(direction, "pageable")
        native = await prepared.native(direction, "pageable")
        return Reading(
            native / samples.our_ms, f"{ms(samples.our_ms)} ms, llama.cpp {ms(native)} ms"
        )

    name = f"pageable {direction} against llama.cpp"
    return Measurement(name, "times as fast", goal, measure)


def against_prefill(goal: Goal | None, mode: LoadMode = "auto") -> Measurement:
    async def measure(prepared: Prepared) -> Reading:
        samples = await prepared.transfers("load", mode=mode)
        return Reading(
            prepared.prefill_ms / samples.our_ms,
            f"load {ms(samples.our_ms)} ms, prefill of {prepared.prefill_tokens} tokens "
            f"{ms(prepared.prefill_ms)} ms",
        )

    name = f"{_name('load', mode)} against prefill"
    return Measurement(name, "times as fast", goal, measure)


def both_directions(goal: Goal) -> Measurement:
    """Compares a load and a save at the same time with a save alone, while bytes move."""

    async def measure(prepared: Prepared) -> Reading:
        other = await prepared.engine.allocate(prepared.nbytes)
        other.numpy()[:] = prepared.pinned.numpy()
        one = (await prepared.transfers("save")).moving_ms
        ours, raw = [], []
        for _ in range(prepared.repeats):
            # The load takes longer to record. Submitted first, it begins at about the same time.
            load = await prepared.llama.start_load(other, 2, priority="urgent")
            save = await prepared.llama.start_save(SAVED, into=prepared.pinned, priority="urgent")
            (await save.wait()).close()  # the next save goes to the same memory
            await load.wait()
            pair = (ended(save), ended(load))
            begin_ns = min(done.started_ns for done in pair)
            ours.append((max(done.finished_ns for done in pair) - begin_ns) / 1e6)
            address = other.numpy().ctypes.data
            raw.append(await anyio.to_thread.run_sync(prepared.raw.both_seconds, address))
        raw_one = (await prepared.transfers("save")).raw_ms
        value = 2 * one / statistics.median(ours)
        hardware = 2 * raw_one / statistics.median(raw) / 1e3
        both = ms(statistics.median(ours))
        text = f"{both} ms, a save alone {ms(one)} ms; raw copies: {hardware:.2f}"
        return Reading(value, text, {"raw": hardware})

    return Measurement("both directions at once", "times one direction", goal, measure)


def first_byte(goal: Goal) -> Measurement:
    """How long a small save takes until its first piece moves."""

    async def measure(prepared: Prepared) -> Reading:
        per_token = prepared.llama.size(SAVED) / prepared.prefill_tokens
        tokens = max(1, round((4 << 20) / per_token))
        await prepared.llama.run(prepared.context.decode, [(SMALL, 1)] * tokens)
        times, listing = [], []
        for _ in range(4 * prepared.repeats):
            save = await prepared.llama.start_save(SMALL, into=prepared.pinned, priority="urgent")
            (await save.wait()).close()  # the next save goes to the same memory
            done = ended(save)
            times.append((done.started_ns - done.submitted_ns) / 1e3)
            listing.append((done.recorded_ns - done.submitted_ns) / 1e3)
        await prepared.llama.run(prepared.context.remove, SMALL)
        await prepared.llama.save(SAVED, into=prepared.pinned)  # as other measurements expect
        recording = statistics.median(listing)
        text = f"of {done.bytes / 2**20:.1f} MiB; libllama lists and names for {recording:.0f} µs"
        return Reading(statistics.median(times), text, {"recording_us": recording})

    return Measurement("first byte of a 4 MiB save after submit", "µs", goal, measure)


# ---- Size ----------------------------------------------------------------------------------------


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


# ---- Beside decoding -----------------------------------------------------------------------------


def _beside(
    direction: Direction, name: str, unit: str, goal: Goal | None, of: Callable[[Beside], Reading]
) -> Measurement:
    async def measure(prepared: Prepared) -> Reading:
        return of(await prepared.beside(direction, _ROUNDS, _STEPS))

    return Measurement(f"{name} beside a background {direction}", unit, goal, measure)


def decode_percentile(direction: Direction, percent: int, goal: Goal | None) -> Measurement:
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

    return _beside(direction, f"decode p{percent}", "% more", goal, of)


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


def background_speed(direction: Direction, goal: Goal | None) -> Measurement:
    async def measure(prepared: Prepared) -> Reading:
        beside = await prepared.beside(direction, _ROUNDS, _STEPS)
        raw = (await prepared.transfers(direction)).raw_ms
        text = f"{ms(beside.moving_ms)} ms, raw {ms(raw)} ms alone"
        pace: dict[str, dict[str, int]] = {}
        for device in prepared.engine.describe()["devices"]:
            pace = device.get("background_pace", {}).get(direction, pace)
        if pace:
            found = (f"{p['queued']} x {p['bytes'] / 2**20:.1f}" for p in pace.values())
            text += f"; MiB queued: {' | '.join(found)} (runs, rows, gathered)"
        return Reading(raw / beside.moving_ms, text, {"pace": pace})

    return Measurement(f"background {direction} beside decoding", "of raw speed", goal, measure)


# ---- Memory --------------------------------------------------------------------------------------


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


def same_bytes() -> Measurement:
    """Whether the bytes are right: otherwise the other figures mean nothing."""

    async def measure(prepared: Prepared) -> Reading:
        await prepared.llama.save(SAVED, into=prepared.pinned, priority="urgent")
        address = prepared.pageable.ctypes.data
        await prepared.llama.run(prepared.context.state_get, SAVED, address, prepared.nbytes)
        equal = numpy.array_equal(prepared.pinned.numpy(), prepared.pageable)
        return Reading(float(equal), "the state, against llama.cpp's own call")

    return Measurement("bit-identical", "1 = yes", at_least(1), measure)
