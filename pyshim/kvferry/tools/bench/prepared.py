"""A context with its prompts decoded, and timed transfers: by kvferry, by llama.cpp's own calls,
and by plain copying.

What is compared is measured in turn, so that changes of the machine's speed affect all alike.
"""

from __future__ import annotations

import bisect
import statistics
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import anyio
import numpy
from numpy.typing import NDArray

from ... import Buffer, Completion, Engine, Llama, LoadMode, TraceEvent
from ..._native import lib
from ..libllama import Context, ContextOptions, LlamaError, Model, Step
from ..limits import Direction, Pace
from ..timeline import Span, Timeline
from ..workload import (
    DECODED,
    LOADED,
    SAVED,
    SEQUENCES,
    Arrangement,
    Decoding,
    cells,
    decoding_threads,
    ended,
    prompt,
    seconds,
    submit,
)
from .raw import Raw, RawMaker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ... import Priority

T = TypeVar("T")
Memory = Literal["pinned", "pageable"]

_GPU_WARM_UP_TOKENS = 512  # a whole batch, because kernels are loaded when they are first used
_WARM_UP_TOKENS = 32
SMALL = 3
"""A sequence for small transfers. Empty only where just one sequence has a prompt."""


@dataclass(frozen=True)
class Samples:
    """The seconds of one transfer in several ways, which were measured in turn."""

    ours: list[float]
    """From the submitting call to the completion."""
    moving: list[float]
    """From the first piece to the completion, without recording the layout."""
    raw: list[float]
    completions: list[Completion]

    @property
    def completion(self) -> Completion:
        return self.completions[-1]

    @property
    def listing_ms(self) -> float:
        """How long libllama works before it names the first fragment."""
        return statistics.median((c.listed_ns - c.submitted_ns) / 1e6 for c in self.completions)

    @property
    def naming_ms(self) -> float:
        """How long libllama names fragments, from the first to the last."""
        return statistics.median((c.recorded_ns - c.listed_ns) / 1e6 for c in self.completions)

    @property
    def our_ms(self) -> float:
        return statistics.median(self.ours) * 1e3

    @property
    def moving_ms(self) -> float:
        return statistics.median(self.moving) * 1e3

    @property
    def raw_ms(self) -> float:
        return statistics.median(self.raw) * 1e3


@dataclass(frozen=True)
class Beside:
    """Decoding beside background transfers."""

    idle: list[Step]
    during: list[Step]
    """Steps that overlapped a transfer, without those in ``first``."""
    first: list[Step]
    """The first step after each submitting call. Recording has evicted data from the processor's
    caches, and the device was idle, which costs these steps time."""
    idle_seconds: float
    """Wall time of the idle steps, with the gaps between them."""
    busy_steps: int
    busy_seconds: float
    """Wall time of transfers one after the other, in which ``busy_steps`` steps were decoded."""
    transfers: list[Completion]
    pump_seconds: float
    """Processor time of kvferry's threads during the transfers."""
    paced: list[Step]
    """Steps beside raw copies of the same size and pace as kvferry's background copies."""

    @property
    def moving_ms(self) -> float:
        """From the first piece to the completion."""
        return statistics.median((c.finished_ns - c.started_ns) / 1e6 for c in self.transfers)


@dataclass
class Prepared:
    name: str
    engine: Engine
    llama: Llama
    context: Context
    decoding: Decoding
    nbytes: int
    pinned: Buffer
    pageable: NDArray[numpy.uint8]
    raw: Raw
    repeats: int
    prefill_ms: float
    prefill_tokens: int
    device_bytes_taken: int | None = None
    """Bytes of device memory that the first transfers have taken."""
    timeline: Timeline | None = None
    pieces: list[TraceEvent] = field(default_factory=list)
    _known: dict[str, Any] = field(default_factory=dict)

    async def once(self, key: str, make: Callable[[], Awaitable[T]]) -> T:
        """Returns what ``make`` returned the first time: several measurements share it."""
        if key not in self._known:
            self._known[key] = await make()
        return cast(T, self._known[key])

    def known(self, key: str) -> Any:
        """Returns what ``once`` has made under this key; None if nothing, or if that has failed."""
        return self._known.get(key)

    # ---- Alone on the machine -------------------------------------------------------------------

    async def transfers(
        self, direction: Direction, memory: Memory = "pinned", mode: LoadMode = "auto"
    ) -> Samples:
        """Times urgent transfers in turn with raw copies. ``mode`` is the mode of loads."""

        async def measure() -> Samples:
            ours, moving, raw = [], [], []
            completions: list[Completion] = []
            for index in range(self.repeats + 1):
                completion = await self.transfer(direction, memory, "urgent", mode)
                copy = self.raw.save_seconds if direction == "save" else self.raw.load_seconds
                raw_seconds = await anyio.to_thread.run_sync(copy)
                if mode == "ahead" and completion.mode != lib.KVF_LOAD_AHEAD:
                    raise LlamaError("device memory is too short for a load ahead")
                if index:  # the first round is the warm-up
                    ours.append(seconds(completion))
                    moving.append((completion.finished_ns - completion.started_ns) / 1e9)
                    raw.append(raw_seconds)
                    completions.append(completion)
            return Samples(ours, moving, raw, completions)

        return await self.once(_key(direction, memory, mode), measure)

    def known_transfers(
        self, direction: Direction, memory: Memory = "pinned", mode: LoadMode = "auto"
    ) -> Samples | None:
        """As ``known``."""
        return cast("Samples | None", self._known.get(_key(direction, memory, mode)))

    async def transfer(
        self,
        direction: Direction,
        memory: Memory,
        priority: Priority,
        mode: LoadMode = "auto",
    ) -> Completion:
        buffer = self._buffer(memory)
        if direction == "save":
            save = await self.llama.start_save(SAVED, into=buffer, priority=priority)
            await save.wait()
            return ended(save)
        load = await self.llama.start_load(buffer, LOADED, priority=priority, mode=mode)
        await load.wait()
        return ended(load)

    def _buffer(self, memory: Memory) -> Any:
        return self.pinned if memory == "pinned" else self.pageable

    async def native(self, direction: Direction, memory: Memory) -> float:
        """Returns the milliseconds of llama.cpp's own call, the median of several."""

        async def measure() -> float:
            address = int(self._buffer_address(memory))
            call = self.context.state_get if direction == "save" else self.context.state_set
            seq = SAVED if direction == "save" else LOADED
            times: list[float] = []
            begin = time.monotonic()
            # With half a million fragments a call takes seconds: then one timed call is enough.
            while len(times) <= self.repeats and (len(times) < 2 or time.monotonic() - begin < 5):
                started = time.monotonic()
                done = await self.llama.run(call, seq, address, self.nbytes)
                times.append(time.monotonic() - started)
                if not done:
                    raise LlamaError(f"llama.cpp's own {direction} failed")
            return statistics.median(times[1:]) * 1e3

        return await self.once(f"native {direction} {memory}", measure)

    def _buffer_address(self, memory: Memory) -> int:
        array = self.pinned.numpy() if memory == "pinned" else self.pageable
        address: int = array.ctypes.data
        return address

    # ---- Beside decoding ------------------------------------------------------------------------

    async def beside(self, direction: Direction, rounds: int, steps: int) -> Beside:
        """Decodes ``rounds`` times ``steps`` steps alone, and as many while there is always a
        background transfer in flight.

        Both are done in turn, so that changes of the machine's speed affect both alike. Each round
        starts with the same length of the sequence.
        """

        async def measure() -> Beside:
            return await self._measure_beside(direction, rounds, steps)

        return await self.once(f"beside {direction}", measure)

    async def _measure_beside(self, direction: Direction, rounds: int, steps: int) -> Beside:
        idle: list[Step] = []
        paced: list[Step] = []
        idle_seconds = busy_seconds = pump_seconds = 0.0
        busy_steps = 0
        spans: list[Span] = []
        transfers: list[Completion] = []
        await self.transfer("save", "pinned", "background")  # the warm-up
        await self.decoding.several(3)
        for _ in range(rounds):
            await self.decoding.rewind()
            begin = time.monotonic()
            idle += await self.decoding.several(steps)
            idle_seconds += time.monotonic() - begin
            await self.decoding.rewind()
            self.drain_trace()
            first, begin_ns = len(self.decoding.steps), time.monotonic_ns()
            pump_seconds -= own_seconds()
            await self._keep_transferring(direction, steps, spans, transfers)
            pump_seconds += own_seconds()
            end_ns = time.monotonic_ns()
            busy_seconds += (end_ns - begin_ns) / 1e9
            busy_steps += len(self.decoding.steps) - first
            moved = self.drain_trace()
            await self.decoding.rewind()
            paced += await self._beside_raw(direction, steps)
        if direction == "save":
            self._keep_timeline(begin_ns, end_ns, spans, moved)
        during, first_steps = self._steps_beside(spans)
        return Beside(
            idle,
            during,
            first_steps,
            idle_seconds,
            busy_steps,
            busy_seconds,
            transfers,
            pump_seconds,
            paced,
        )

    async def _keep_transferring(
        self, direction: Direction, steps: int, spans: list[Span], transfers: list[Completion]
    ) -> None:
        """Makes background transfers, one after the other, until ``steps`` steps are decoded."""
        target = len(self.decoding.steps) + steps
        async with self.decoding.running():
            while len(self.decoding.steps) < target and self.decoding.left > 0:
                if direction == "save":
                    start_save = self.llama.start_save(SAVED, into=self.pinned)
                    save, recorded_ns = await submit(self.llama, start_save)
                    (await save.wait()).close()  # the next save goes to the same memory
                    done = ended(save)
                else:
                    start_load = self.llama.start_load(self.pinned, LOADED)
                    load, recorded_ns = await submit(self.llama, start_load)
                    await load.wait()
                    done = ended(load)
                spans.append(Span(direction, done.submitted_ns, recorded_ns, done.finished_ns))
                transfers.append(done)

    def _steps_beside(self, spans: list[Span]) -> tuple[list[Step], list[Step]]:
        """Returns ``during`` and ``first`` of Beside. Each step is once in one of them."""
        begins = [step.begin_ns for step in self.decoding.steps]
        at = (bisect.bisect_left(begins, span.recorded_ns) for span in spans)
        first = {begins[index]: self.decoding.steps[index] for index in at if index < len(begins)}
        during = {
            step.begin_ns: step
            for span in spans
            for step in self.decoding.during(span.submitted_ns, span.finished_ns)
            if step.begin_ns not in first
        }
        return list(during.values()), list(first.values())

    async def _beside_raw(self, direction: Direction, steps: int) -> list[Step]:
        """Decodes beside raw copies at the pace that kvferry has found."""
        if self.raw.paced is None:
            return []
        device = self.engine.describe()["devices"][1]
        found = device["background_pace"][direction]["runs"]
        pace, stop = Pace(found["bytes"], found["queued"]), threading.Event()
        copying = threading.Thread(target=self.raw.paced, args=(direction, pace, stop))
        copying.start()
        try:
            return await self.decoding.several(steps)
        finally:
            stop.set()
            await anyio.to_thread.run_sync(copying.join)

    def _keep_timeline(
        self, begin_ns: int, end_ns: int, spans: list[Span], pieces: list[TraceEvent]
    ) -> None:
        """Keeps the first three transfers of the last round."""
        shown = [span for span in spans if span.submitted_ns >= begin_ns][:3]
        if not shown:
            return
        end_ns = min(end_ns, shown[-1].finished_ns + (end_ns - begin_ns) // 50)
        self.timeline = Timeline(
            f"{self.name}: {self.nbytes / 2**20:.0f} MiB, background saves one after the other",
            begin_ns,
            end_ns,
            self.decoding.during(begin_ns, end_ns),
            shown,
            pieces,
        )

    def drain_trace(self) -> list[TraceEvent]:
        events = self.engine.trace()
        self.pieces += events
        return events


def _key(direction: Direction, memory: Memory, mode: LoadMode) -> str:
    return f"{direction} {memory} {mode}"


def own_seconds() -> float:
    """Returns the processor time of kvferry's threads so far."""
    total = 0
    for task in Path("/proc/self/task").iterdir():
        try:
            if (task / "comm").read_text().startswith("kvf-"):
                total += int((task / "schedstat").read_text().split()[0])
        except FileNotFoundError:
            pass  # a thread that has ended
    return total / 1e9


@asynccontextmanager
async def prepare(
    name: str,
    engine: Engine,
    model: Model,
    make_raw: RawMaker,
    *,
    arrangement: Arrangement,
    tokens: int,
    flash_attention: bool,
    steps: int,
    repeats: int,
) -> AsyncIterator[Prepared]:
    """Decodes the prompts and allocates the buffers.

    ``steps`` is the most tokens that measurements decode later.
    """
    small = _GPU_WARM_UP_TOKENS if model.gpu else _WARM_UP_TOKENS
    options = ContextOptions(
        n_ctx=cells(arrangement, tokens, steps + 2 * small + 8),
        n_seq_max=SEQUENCES,
        threads=decoding_threads(),
        flash_attention=flash_attention,
    )
    with Context(model, options) as context:
        library = model.library.loaded_as
        async with engine.attach(context.address, library=library) as llama:
            await _warm_up(llama, context, arrangement, small)
            items = prompt(arrangement, tokens, model.vocabulary)
            prefill = await llama.run(context.decode, items)
            nbytes = llama.size(SAVED)
            pinned = await engine.allocate(nbytes)
            pageable = numpy.ones(nbytes, numpy.uint8)
            taken = await _first_transfers(llama, pinned, make_raw)
            pageable[:] = pinned.numpy()
            raw = make_raw(pinned.numpy().ctypes.data, pageable.ctypes.data, nbytes)
            prepared = Prepared(
                name,
                engine,
                llama,
                context,
                Decoding(llama, context, steps),
                nbytes,
                pinned,
                pageable,
                raw,
                repeats,
                prefill.ms,
                len(items),
                device_bytes_taken=taken,
            )
            try:
                yield prepared
            finally:
                prepared.drain_trace()
                raw.close()


async def _warm_up(llama: Llama, context: Context, arrangement: Arrangement, tokens: int) -> None:
    await llama.run(context.decode, [(SMALL, 1)] * tokens)
    await llama.run(context.remove, SMALL)
    if arrangement == "alone":
        # A short sequence of its own, so that its steps cost about the same throughout.
        await llama.run(context.decode, [(DECODED, 1)] * tokens)


async def _first_transfers(llama: Llama, buffer: Buffer, make_raw: RawMaker) -> int | None:
    """Saves and loads once. Returns how many bytes of device memory that has taken; None where
    nothing tells."""
    before = make_raw.device_free_bytes()
    await llama.save(SAVED, into=buffer, priority="urgent")
    await llama.load(buffer, LOADED, priority="urgent")
    after = make_raw.device_free_bytes()
    return None if before is None or after is None else before - after
