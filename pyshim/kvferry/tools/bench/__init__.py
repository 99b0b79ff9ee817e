"""``kvferry bench``: measures kvferry's speed, and compares each figure with its goal and limit.

``matrix`` lists the measurements, ``figures`` defines them, and ``preparing`` makes their contexts.
``alone`` and ``beside`` time the transfers that several figures share. All run in one process. A
measurement that fails loses only its own line. Each result is written to the disk at once.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ... import Devices, Engine, __version__
from ..._bridge.arguments import invalid
from ..causes import cause
from ..libllama import Libllama, Model, find
from ..limits import Direction, RawCuda
from ..models import on_gpu, synthetic_model
from ..table import Progress, table
from ..timeline import Timeline, draw
from . import block_matrix, matrix
from .beside import Beside
from .conversation import Turn
from .measurement import Measurement, Result, Stage, failure, result
from .moved import BLOCK_TOKENS, Moved, of_moved
from .pictures import Bars, Growth, Latencies, draw_bars, draw_growth, draw_latencies
from .prepared import CONVERSATION, Prepared, beside_key
from .raw import Memcpy, PinnedCopies
from .trace import Trace

_SECONDS = 285
"""After so many seconds no measurement is begun any more: rented GPUs are paid by time."""


Matrix = Literal["states", "blocks"]
"""What is measured: whole states (``matrix``), or blocks beside them (``block_matrix``)."""


@dataclass(frozen=True)
class Options:
    llama_lib: str | None = None
    model: str | None = None
    out: str = "kvferry-bench"
    tokens: int | None = None
    device: Devices = "auto"
    only: Sequence[str] | None = None
    matrix: Matrix = "states"


async def bench(options: Options, progress: Progress) -> bool:
    """Measures, prints the table, and writes the files.

    Returns True if no measurement has failed, whether or not goals were met: goals are for one
    kind of machine. Raises LlamaError and KvferryError if nothing can be measured at all.
    """
    library = Libllama(find(options.llama_lib))
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(Engine(options.device, trace=True))
        description = engine.describe()
        gpu = on_gpu(description, options.device, library)
        models = _Models(library, options.model, gpu, progress)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvferry-bench-"))
        models.folder = Path(folder)
        stack.callback(models.close)
        raw: Memcpy | PinnedCopies
        if gpu:
            raw = PinnedCopies(stack.enter_context(RawCuda()))
        else:
            raw = Memcpy(description["devices"][0]["copy_threads"])
        plan = matrix.Bench(engine, models.open, raw, options.tokens, options.model is not None)
        measured = block_matrix if options.matrix == "blocks" else matrix
        stages = measured.cuda(plan) if gpu else measured.host(plan)
        _check_wanted(options.only, stages)
        run = _Run(_folder(options.out), progress, options.only)
        run.facts = {
            "kvferry": __version__,
            "libllama": {"path": library.path, "build": library.build},
            "engine": description,
            "cores": len(os.sched_getaffinity(0)),
            "model": options.model or "synthetic",
            "raw": raw.name,
        }
        for stage in stages:
            await run.stage(stage)
    run.finish()
    return all(not each.error for each in run.results)


def _title(stage: Stage, measurement: Measurement) -> str:
    return f"{stage.name}: {measurement.name}"


def _check_wanted(only: Sequence[str] | None, stages: Sequence[Stage]) -> None:
    titles = [_title(stage, each) for stage in stages for each in stage.measurements]
    for text in only or ():
        if not any(text in title for title in titles):
            raise invalid(f"no measurement's name contains {text!r}: {', '.join(titles)}")


def _folder(name: str) -> Path:
    path = Path(name)
    path.mkdir(parents=True, exist_ok=True)
    return path


class _Models:
    """Loads the user's model, or writes and loads the synthetic model that a stage wants."""

    def __init__(self, library: Libllama, path: str | None, gpu: bool, progress: Progress) -> None:
        self._library, self._path, self._gpu, self._progress = library, path, gpu, progress
        self.folder = Path()
        self._loaded: tuple[Path, Model] | None = None

    @asynccontextmanager
    async def open(self, kind: str, sizes: Mapping[str, int]) -> AsyncIterator[Model]:
        if self._path:
            path = Path(self._path)
        else:
            path = synthetic_model(self.folder, kind, sizes, self._progress)
        if self._loaded is None or self._loaded[0] != path:
            self.close()
            self._progress.say(f"loading {path.name}")
            self._loaded = (path, Model(self._library, path, gpu=self._gpu))
        yield self._loaded[1]

    def close(self) -> None:
        if self._loaded is not None:
            self._loaded[1].close()
            self._loaded = None


class _Run:
    """The results so far, and the files that they are written to."""

    def __init__(self, out: Path, progress: Progress, only: Sequence[str] | None) -> None:
        self._out, self._progress, self._only = out, progress, only
        self._begin = time.monotonic()
        self.facts: dict[str, Any] = {}
        self.results: list[Result] = []
        self._timelines: list[Timeline] = []
        self._bars: list[Bars] = []
        self._latencies: list[Latencies] = []
        self._growth: Growth | None = None
        self._trace = Trace()

    async def stage(self, stage: Stage) -> None:
        wanted = [
            each
            for each in stage.measurements
            if self._only is None or any(text in _title(stage, each) for text in self._only)
        ]
        if not wanted:
            return
        if self._time_is_up():
            self._all_failed(stage, wanted, "not begun: time is up")
            return
        self._progress.say(f"{stage.name}: preparing")
        try:
            async with stage.open() as prepared:
                for measurement in wanted:
                    await self._measure(stage.name, measurement, prepared)
                await self._collect(prepared)
        except Exception as error:  # a stage that fails must not lose the others
            done = {(each.stage, each.name) for each in self.results}
            missing = [each for each in wanted if (stage.name, each.name) not in done]
            self._all_failed(stage, missing, _text(error))
            if not missing:
                self._progress.say(f"{stage.name}: {_text(error)}")

    async def _measure(self, stage: str, measurement: Measurement, prepared: Prepared) -> None:
        if self._time_is_up():
            self._add(failure(stage, measurement, "not begun: time is up"))
            return
        try:
            reading = await measurement.measure(prepared)
        except Exception as error:  # a measurement that fails must not lose the others
            self._add(failure(stage, measurement, _text(error)))
            return
        finally:
            prepared.drain_trace()
        self._add(result(stage, measurement, reading))

    def _all_failed(self, stage: Stage, measurements: list[Measurement], error: str) -> None:
        for measurement in measurements:
            self._add(failure(stage.name, measurement, error))

    def _add(self, line: Result) -> None:
        self.results.append(line)
        if line.value is None:
            text = line.error or line.limit
        else:
            text = f"{line.value:.4g} {line.unit} {line.limit and f'({line.limit})'}"
        self._progress.say(f"{line.stage}: {line.name}: {text}")
        # Written after each result, so that a run that is killed leaves its results.
        report = {
            **self.facts,
            "seconds": time.monotonic() - self._begin,
            "results": [each.as_dict() for each in self.results],
        }
        (self._out / "bench.json").write_text(json.dumps(report, indent=2) + "\n")

    def _time_is_up(self) -> bool:
        return time.monotonic() - self._begin > _SECONDS

    async def _collect(self, prepared: Prepared) -> None:
        """Keeps what the pictures will show of a stage."""
        for direction in ("save", "load"):
            ways = _ways(prepared, direction)
            if any(way.startswith("llama.cpp") for way in ways):
                size = f"{prepared.nbytes / 2**20:.0f} MiB"
                self._bars.append(Bars(f"{direction}, {prepared.name}\n{size}", ways))
            for moved in get_args(Moved):
                beside: Beside | None = prepared.known(beside_key(direction, moved))
                if beside is not None:
                    self._latencies.append(
                        Latencies(
                            f"{prepared.name}, background {direction}s{of_moved(moved)}",
                            [step.ms for step in beside.idle],
                            [step.ms for step in beside.during],
                        )
                    )
        turns: list[Turn] | None = prepared.known(CONVERSATION)
        if turns is not None:
            self._growth = _growth(turns)
        if prepared.timeline is not None:
            self._timelines.append(prepared.timeline)
        self._trace.add(prepared.name, prepared.decoding.steps, prepared.pieces)

    def _draw_growth(self, path: Path) -> None:
        assert self._growth is not None
        draw_growth(self._growth, path, heading="Bytes moved by the save after each turn")

    def finish(self) -> None:
        text = _table(self.results)
        print(f"\n{text}\n", flush=True)
        (self._out / "bench.txt").write_text(text + "\n")
        self._trace.write(self._out / "trace.json")
        limit = self.facts["raw"]
        pictures: list[tuple[str, bool, Callable[[Path], None]]] = [
            (
                "layouts.png",
                bool(self._bars),
                lambda path: draw_bars(
                    self._bars, path, heading=f"Saving and loading a sequence (raw: {limit})"
                ),
            ),
            (
                "decoding.png",
                bool(self._latencies),
                lambda path: draw_latencies(
                    self._latencies, path, heading="Decode steps, alone and beside transfers"
                ),
            ),
            (
                "turns.png",
                self._growth is not None,
                self._draw_growth,
            ),
            (
                "timeline.png",
                bool(self._timelines),
                lambda path: draw(
                    self._timelines, path, heading="Background saves beside decoding"
                ),
            ),
        ]
        for name, wanted, picture in pictures:
            if not wanted:
                continue
            try:
                picture(self._out / name)
            except Exception as error:  # the figures have been written
                self._progress.say(f"no {name}: {type(error).__name__}: {error}")
        self._progress.say(f"written to {self._out}/")


def _text(error: Exception) -> str:
    named = cause(error)
    return f"{type(named).__name__}: {named}"


def _growth(turns: Sequence[Turn]) -> Growth:
    return Growth(
        f"turns of {BLOCK_TOKENS} tokens; {turns[0].block_bytes / 2**20:.1f} MiB of KV cache each",
        [turn.tokens for turn in turns],
        [turn.state_bytes / 2**20 for turn in turns],
        [turn.block_bytes / 2**20 for turn in turns],
    )


def _ways(prepared: Prepared, direction: Direction) -> dict[str, float]:
    ways: dict[str, float] = {}
    if samples := prepared.known_transfers(direction):
        ways = {"raw copy": samples.raw_ms, "kvferry, urgent": samples.our_ms}
    if samples := prepared.known_transfers(direction, mode="ahead"):
        ways["kvferry, ahead"] = samples.our_ms
    for memory in ("pinned", "pageable"):
        native = prepared.known(f"native {direction} {memory}")
        if native is not None:
            ways[f"llama.cpp, {memory}"] = native
    return ways


def _table(results: list[Result]) -> str:
    rows = []
    for each in results:
        reached = {True: "yes", False: "no", None: "failed" if each.error else ""}[each.met]
        value = "" if each.value is None else f"{each.value:.3g}"
        limit = each.error or each.limit
        rows.append([each.stage, each.name, each.goal, value, each.unit, reached, limit])
    header = ["layout", "figure", "goal", "reached", "unit", "met", "measured"]
    return table(header, rows, left=(0, 1, 4, 5, 6))
