"""``kvferry demo``: the main job at small scale, against llama.cpp's own calls.

For each layout of a cache, two contexts are made alike. In the first, kvferry saves sequence 0 and
loads it into sequence 2 while sequence 1 decodes. In the second, the same tokens are decoded in the
same order, and llama.cpp's own blocking calls save and load at the same points. So the same state
lies in the same cells of both, and everything has to agree bit for bit.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy
from numpy.typing import NDArray

from .. import Completion, __version__
from ..devices import Devices
from ..engine import Engine, TraceEvent
from ..llama import Llama
from ..snapshot import Snapshot
from ..transfer import Priority
from .libllama import Context, ContextOptions, Libllama, LlamaError, Model, Step, find
from .synthetic import write_model
from .table import Progress, mib, ms, table
from .timeline import Span, Timeline, check_kind, draw
from .workload import (
    LOADED,
    SAVED,
    SEQUENCES,
    Arrangement,
    Decoding,
    Items,
    cells,
    decoding_threads,
    prompt,
    step_percentile,
    submit,
)

_REPEATS = 5  # of every timed save and load; the figures are medians
_IDLE_STEPS = 6  # before each repeat
_SPARE = 320  # tokens that sequence 1 may grow by
_SIZE_QUERIES = 50


@dataclass(frozen=True)
class Options:
    llama_lib: str | None = None
    model: str | None = None
    json: str | None = None
    picture: str | None = None
    tokens: int | None = None
    device: Devices = "auto"


@dataclass(frozen=True)
class Layout:
    name: str
    arrangement: Arrangement = "alone"
    flash_attention: bool = True
    kind: str = "llama"
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Of the synthetic model: what differs from the geometry "demo"."""
    most_tokens: int | None = None


LAYOUTS = [
    Layout("contiguous"),
    Layout("V transposed", flash_attention=False),
    Layout("fragmented", arrangement="in turn"),
]

# Not of every model, and small: their point is that decoding overwrites what is being saved.
OTHER_CACHES = [
    Layout("sliding window", kind="gemma3", sizes={"layers": 16, "window": 128}),
    Layout(
        "recurrent",
        kind="mamba",
        sizes={"layers": 16, "embedding": 256, "state": 256},
        most_tokens=64,  # slow to compute, and the state's size doesn't depend on it
    ),
]


Event = int | Literal["save", "load"]
"""Something that happened to a context: the number of a decode step, or a transfer."""


@dataclass
class Ours:
    """What came of a layout with kvferry."""

    state: NDArray[numpy.uint8]
    state_by_llama: NDArray[numpy.uint8]
    """Of the same sequence of the same context, by llama.cpp's own call."""
    resaved: NDArray[numpy.uint8]
    """The loaded sequence, saved again."""
    logits: bytes
    script: list[Event]
    """What happened after the prompt, in order."""
    figures: dict[str, Any]
    timeline: Timeline


@dataclass
class Theirs:
    """What came of it with llama.cpp's own calls."""

    state: NDArray[numpy.uint8]
    resaved: NDArray[numpy.uint8]
    logits: bytes
    figures: dict[str, Any]


async def demo(options: Options, progress: Progress) -> bool:
    """Runs all layouts, writes what was asked for. True if every one was bit-identical.

    Raises LlamaError, KvferryError and OSError.
    """
    for file in (options.json, options.picture):
        if file and not Path(file).parent.is_dir():  # now rather than after all the work
            raise NotADirectoryError(errno.ENOTDIR, "no folder to write to", str(Path(file).parent))
    if options.picture:
        check_kind(Path(options.picture))
    library = Libllama(find(options.llama_lib))
    progress.say(f"libllama: {library.path} ({library.source}; {library.build})")
    cores = len(os.sched_getaffinity(0))
    threads = decoding_threads()
    async with Engine(options.device, trace=True) as engine:
        devices = engine.describe()["devices"]
        gpu = any(device["kind"] == "cuda" for device in devices) and (
            options.device == "cuda" or library.offloads
        )
        progress.say(f"engine: {', '.join(device['name'] for device in devices)}")
        tokens = options.tokens or (4096 if gpu else 512)
        rows: list[dict[str, Any]] = []
        timelines: list[Timeline] = []
        with tempfile.TemporaryDirectory(prefix="kvferry-demo-") as folder:
            for layout in LAYOUTS if options.model else [*LAYOUTS, *OTHER_CACHES]:
                model_path = options.model or _synthetic(layout, Path(folder), progress)
                try:
                    with Model(library, model_path, gpu=gpu) as model:
                        row, timeline = await _compare(
                            layout, model, engine, tokens, threads, progress
                        )
                except LlamaError as failure:
                    if options.model is None:
                        raise
                    # Not every model can do without flash attention, or has memory for four.
                    progress.say(f"{layout.name}: not with this model: {failure}")
                    continue
                rows.append(row)
                timelines.append(timeline)
    if not rows:
        raise LlamaError("this model could be run in none of the layouts")

    _print_table(rows, cores, threads, gpu)
    if options.picture:
        _picture(timelines, Path(options.picture), progress)
    if options.json:
        report = {
            "kvferry": __version__,
            "libllama": {"path": library.path, "build": library.build, "source": library.source},
            "machine": {"cpu": _cpu(), "cores": cores, "decoding_threads": threads},
            "devices": devices,
            "model": options.model or "synthetic",
            "repeats": _REPEATS,
            "layouts": rows,
        }
        _write(Path(options.json), report)
        progress.say(f"figures: {options.json}")
    return all(row["bit_identical"] for row in rows)


def _write(path: Path, report: dict[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=2) + "\n")


def _synthetic(layout: Layout, folder: Path, progress: Progress) -> Path:
    path = folder / f"{layout.kind}.gguf"
    if not path.exists():
        progress.say(f"writing a synthetic model ({layout.kind})")
        try:
            write_model(layout.kind, path, geometry="demo", **layout.sizes)
        except ImportError as failure:
            raise LlamaError(f"{failure}; or name a model with --model FILE") from None
    return path


async def _compare(
    layout: Layout, model: Model, engine: Engine, tokens: int, threads: int, progress: Progress
) -> tuple[dict[str, Any], Timeline]:
    def say(text: str) -> None:
        progress.say(f"{layout.name}: {text}")

    tokens = min(tokens, layout.most_tokens or tokens)
    each = tokens if layout.arrangement == "alone" else max(1, tokens // SEQUENCES)
    context_options = ContextOptions(
        n_ctx=cells(layout.arrangement, each, _SPARE),
        n_seq_max=SEQUENCES,
        threads=threads,
        flash_attention=layout.flash_attention,
    )
    items = prompt(layout.arrangement, each, model.vocabulary)
    with Context(model, context_options) as context:
        async with engine.attach(context.address, library=model.library.loaded_as) as llama:
            ours = await _with_kvferry(layout, engine, llama, context, items, say)
    with Context(model, context_options) as context:
        theirs = _with_llama(context, items, ours, say)

    agreement = {
        "blob": numpy.array_equal(ours.state, theirs.state)
        and numpy.array_equal(ours.state, ours.state_by_llama),
        "saved_again": numpy.array_equal(ours.resaved, theirs.resaved),
        "next_logits": ours.logits == theirs.logits,
    }
    identical = all(agreement.values())
    say("bit-identical" if identical else f"DIFFERS: {agreement}")
    row = {
        "layout": layout.name,
        "bit_identical": identical,
        "agreement": agreement,
        "flash_attention": layout.flash_attention,
        "model": model.description,
        "tokens": each,
        **ours.figures,
        **theirs.figures,
    }
    return row, ours.timeline


# ---- With kvferry --------------------------------------------------------------------------------


async def _with_kvferry(
    layout: Layout,
    engine: Engine,
    llama: Llama,
    context: Context,
    items: Items,
    say: Callable[[str], None],
) -> Ours:
    say(f"decoding a prompt of {len(items)} tokens")
    prefill = await llama.run(context.decode, items)
    nbytes = llama.size(SAVED)
    size_query_us = _median_us(lambda: llama.size(SAVED))

    say(f"saving {mib(nbytes)} MiB, alone and beside decoding")
    run = _Run(engine, llama, context, await engine.allocate(nbytes))
    for _ in range(_REPEATS + 1):  # the first touches the memory
        await run.save("urgent")
    alone = run.saves[1:]
    run.saves.clear()
    idle: list[Step] = []
    timeline = None
    for _ in range(_REPEATS):
        # In turn with the transfers: steps grow slower with the sequence's length.
        idle += await run.decoding.several(_IDLE_STEPS)
        timeline = await run.beside_decoding(layout.name)
    assert timeline is not None
    beside_saves, beside_loads = list(run.saves), list(run.loads)
    during = run.steps_during_transfers()
    run.loads.clear()
    # Decoding other sequences may have taken cells that have left a sliding window: what is
    # compared is one moment's.
    snapshot = await run.save("urgent")
    reference = numpy.empty(llama.size(SAVED), numpy.uint8)
    await llama.run(context.state_get, SAVED, reference.ctypes.data, reference.nbytes)
    for _ in range(_REPEATS):
        await run.load(snapshot, "urgent")
    completion = alone[-1].completion

    resaved = await llama.save(LOADED)
    await llama.run(context.decode, _next_token(context))
    return Ours(
        state=snapshot.numpy().copy(),
        state_by_llama=reference,
        resaved=resaved.numpy().copy(),
        logits=context.logits(),
        script=run.script(),
        figures={
            "state_bytes": nbytes,
            "fragments": completion.fragments,
            "segments": completion.segments,
            "save_mode": {1: "in_place", 2: "snapshot"}[completion.mode],
            "size_query_us": size_query_us,
            "submit_ms": statistics.median(each.submit_ms for each in alone),
            "save_ms": statistics.median(each.ms for each in alone),
            "load_ms": statistics.median(each.ms for each in run.loads),
            "save_beside_decoding_ms": statistics.median(each.ms for each in beside_saves),
            "load_beside_decoding_ms": statistics.median(each.ms for each in beside_loads),
            "prefill_ms": prefill.ms,
            "prefill_tokens": len(items),
            "decode_p50_ms": _both(idle, during, 50),
            "decode_p99_ms": _both(idle, during, 99),
            "decode_steps": {"idle": len(idle), "during_transfers": len(during)},
        },
        timeline=timeline,
    )


@dataclass(frozen=True)
class _Timed:
    """A transfer, and when its submitting call came back: until then the layout was recorded."""

    recorded_ns: int
    completion: Completion

    def span(self, direction: Literal["save", "load"]) -> Span:
        done = self.completion
        return Span(direction, done.submitted_ns, self.recorded_ns, done.finished_ns)

    @property
    def submit_ms(self) -> float:
        return (self.recorded_ns - self.completion.submitted_ns) / 1e6

    @property
    def ms(self) -> float:
        """From the submitting call to the completion."""
        return (self.completion.finished_ns - self.completion.submitted_ns) / 1e6


class _Run:
    """The saves, loads and decode steps of one context, and when they were."""

    def __init__(self, engine: Engine, llama: Llama, context: Context, buffer: Any) -> None:
        self._engine, self._llama, self._buffer = engine, llama, buffer
        self.decoding = Decoding(llama, context, _SPARE - 1)
        self.saves: list[_Timed] = []
        self.loads: list[_Timed] = []
        self._transfers: list[tuple[int, Event]] = []
        self._intervals: list[tuple[int, int]] = []

    async def save(self, priority: Priority) -> Snapshot:
        start = self._llama.start_save(SAVED, into=self._buffer, priority=priority)
        transfer, recorded_ns = await submit(self._llama, start)
        snapshot = await transfer.wait()
        timed = _timed(recorded_ns, transfer.completion)
        self.saves.append(timed)
        self._transfers.append((timed.completion.submitted_ns, "save"))
        return snapshot

    async def load(self, snapshot: Snapshot, priority: Priority) -> None:
        start = self._llama.start_load(snapshot, LOADED, priority=priority)
        transfer, recorded_ns = await submit(self._llama, start)
        await transfer.wait()
        timed = _timed(recorded_ns, transfer.completion)
        self.loads.append(timed)
        self._transfers.append((timed.completion.submitted_ns, "load"))

    async def beside_decoding(self, name: str) -> Timeline:
        """A save and a load in the background, with decode steps before, during and after."""
        self._engine.trace()
        begin = time.monotonic_ns()
        async with self.decoding.running():
            await self.decoding.pass_steps(2)
            snapshot = await self.save("background")
            await self.decoding.pass_steps(2)
            await self.load(snapshot, "background")
            await self.decoding.pass_steps(2)
        end = time.monotonic_ns()
        save, load = self.saves[-1], self.loads[-1]
        for timed in (save, load):
            done = timed.completion
            self._intervals.append((done.submitted_ns, done.finished_ns))
        pieces: list[TraceEvent] = self._engine.trace()
        title = (
            f"{name}: {mib(save.completion.bytes)} MiB in {save.completion.fragments:,} fragments"
            f", saved in {ms(save.ms)} ms, loaded in {ms(load.ms)} ms"
        )
        spans = [save.span("save"), load.span("load")]
        return Timeline(title, begin, end, self.decoding.during(begin, end), spans, pieces)

    def steps_during_transfers(self) -> list[Step]:
        found = [self.decoding.during(begin, end) for begin, end in self._intervals]
        return list({step.begin_ns: step for steps in found for step in steps}.values())

    def script(self) -> list[Event]:
        """Steps and transfers, in the order in which the context saw them."""
        events: list[tuple[int, Event]] = [
            (step.begin_ns, index) for index, step in enumerate(self.decoding.steps)
        ]
        return [event for _, event in sorted(events + self._transfers, key=lambda pair: pair[0])]


def _timed(recorded_ns: int, completion: Completion | None) -> _Timed:
    assert completion is not None
    return _Timed(recorded_ns, completion)


# ---- With llama.cpp's own calls ------------------------------------------------------------------


def _with_llama(context: Context, items: Items, ours: Ours, say: Callable[[str], None]) -> Theirs:
    say("the same with llama.cpp's own calls")
    context.decode(items)
    nbytes = context.state_size(SAVED)
    buffer = numpy.zeros(nbytes, numpy.uint8)  # as touched as kvferry's is
    address = buffer.ctypes.data
    save_ms = [
        _call_ms(lambda: context.state_get(SAVED, address, nbytes), "save")
        for _ in range(_REPEATS + 1)
    ][1:]
    size_query_us = _median_us(lambda: context.state_size(SAVED))
    load_ms: list[float] = []
    decoding = Decoding(None, context, _SPARE)  # type: ignore[arg-type]  # only for its tokens
    state = buffer
    for event in ours.script:
        if event == "save":
            state = buffer[: context.state_get(SAVED, address, nbytes)]
        elif event == "load":
            call = functools.partial(context.state_set, LOADED, address, state.nbytes)
            load_ms.append(_call_ms(call, "load"))
        else:
            context.decode(decoding.items(event))
    resaved = numpy.empty(context.state_size(LOADED), numpy.uint8)
    context.state_get(LOADED, resaved.ctypes.data, resaved.nbytes)
    context.decode(_next_token(context))
    return Theirs(
        state,
        resaved,
        context.logits(),
        {
            "native_save_ms": statistics.median(save_ms),
            "native_load_ms": statistics.median(load_ms),
            "native_size_query_us": size_query_us,
        },
    )


def _next_token(context: Context) -> Items:
    return [(LOADED, 1 % context.model.vocabulary)]


def _call_ms(call: Callable[[], int], what: str) -> float:
    begin = time.monotonic_ns()
    done = call()
    end = time.monotonic_ns()
    if not done:
        raise LlamaError(f"llama.cpp's own {what} failed")
    return (end - begin) / 1e6


# ---- Figures -------------------------------------------------------------------------------------


def _median_us(call: Callable[[], object]) -> float:
    times = []
    for _ in range(_SIZE_QUERIES):
        begin = time.monotonic_ns()
        call()
        times.append(time.monotonic_ns() - begin)
    return statistics.median(times) / 1e3


def _both(idle: list[Step], during: list[Step], percent: float) -> dict[str, float | None]:
    """None where no step fell beside a transfer."""
    return {
        "idle": step_percentile(idle, percent),
        "during_transfers": step_percentile(during, percent),
    }


def _print_table(rows: list[dict[str, Any]], cores: int, threads: int, gpu: bool) -> None:
    header = [
        "\nlayout",
        "state\nMiB",
        "\nfragments",
        "size\nµs",
        "submit\nms",
        "save ms\nkvferry",
        "\nllama.cpp",
        "load ms\nkvferry",
        "\nllama.cpp",
        "prefill\nms",
        "decode step ms: idle\np50/p99",
        "beside\np50/p99",
        "bit_\nidentical",
    ]

    def steps(row: dict[str, Any], when: str) -> str:
        if not row["decode_steps"][when]:
            return "-"  # the transfers were too short to meet one
        return f"{ms(row['decode_p50_ms'][when])}/{ms(row['decode_p99_ms'][when])}"

    lines = [
        [
            row["layout"],
            mib(row["state_bytes"]),
            f"{row['fragments']:,}",
            f"{row['size_query_us']:.0f}",
            ms(row["submit_ms"]),
            ms(row["save_ms"]),
            ms(row["native_save_ms"]),
            ms(row["load_ms"]),
            ms(row["native_load_ms"]),
            ms(row["prefill_ms"]),
            steps(row, "idle"),
            steps(row, "during_transfers"),
            str(row["bit_identical"]).lower(),
        ]
        for row in rows
    ]
    print(f"\n{table(header, lines)}\n", flush=True)
    print(
        f"Medians of {_REPEATS}. Saves and loads alone on the machine, kvferry's urgent, from the "
        "call to the completion.\n'beside': decode steps of another sequence while kvferry saves "
        "and loads in the background.\nprefill: all prompts of the layout."
    )
    if not gpu:
        print(
            "The cache lies in host memory here: a transfer is a copy from memory to memory by the "
            f"same {cores} cores\nthat decode ({threads} of them). It shows that the bytes are "
            "right and that decoding goes on, not what a GPU gains."
        )


def _picture(timelines: list[Timeline], path: Path, progress: Progress) -> None:
    try:
        draw(timelines, path, heading="kvferry demo: decoding goes on while a sequence is moved")
    except ImportError:
        progress.say("no picture: pip install matplotlib")
        return
    progress.say(f"picture: {path}")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown")
