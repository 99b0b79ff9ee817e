"""The speed of transfers alone on the machine."""

from __future__ import annotations

import statistics

import anyio

from .... import LoadMode
from ...limits import Direction
from ...table import ms
from ...workload import SAVED, ended
from ..context import SMALL
from ..measurement import Goal, Measurement, Reading
from ..moved import Moved, of_moved
from ..prepared import Prepared


def of_raw(
    direction: Direction, goal: Goal | None, interleaved: int = 1, moved: Moved = "state"
) -> Measurement:
    """Speed while bytes move, compared with raw copies. ``beyond_raw`` includes the recording.

    ``interleaved`` is the number of sequences whose rows alternate. If there are several, the time
    of as many raw copies of rows is shown too.
    """

    async def measure(prepared: Prepared) -> Reading:
        samples = await prepared.transfers(direction, moved=moved)
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

    name = f"urgent {direction}{of_moved(moved)}"
    return Measurement(name, "of raw speed", goal, measure)


def beyond_raw(
    direction: Direction, goal: Goal | None, mode: LoadMode = "auto", moved: Moved = "state"
) -> Measurement:
    """Milliseconds from the submitting call to the completion, less those of a raw copy."""

    async def measure(prepared: Prepared) -> Reading:
        samples = await prepared.transfers(direction, mode=mode, moved=moved)
        return Reading(
            samples.our_ms - samples.raw_ms,
            f"{ms(samples.our_ms)} ms, raw {ms(samples.raw_ms)} ms; libllama lists for "
            f"{ms(samples.listing_ms)} ms, names for {ms(samples.naming_ms)} ms"
            + (f"; {prepared.nbytes >> 20} MiB of device memory" if mode == "ahead" else ""),
            {"listing_ms": samples.listing_ms, "naming_ms": samples.naming_ms},
        )

    name = f"submit to completion of a {_name(direction, mode)}{of_moved(moved)}, beyond raw"
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
