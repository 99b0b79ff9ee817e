"""``kvferry demo``: saves and loads beside decoding, compared with llama.cpp's own calls.

For each layout of a cache there are two equal contexts. In the first, kvferry saves sequence 0 and
loads it into sequence 2 while sequence 1 decodes. In the second, the same tokens are decoded in the
same order, and llama.cpp's own blocking calls save and load at the same points. So the same cells
of both hold the same state, and everything must be equal bit for bit.

Then a conversation outlives its process: see restart.py.
"""

from __future__ import annotations

import errno
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import Devices, Engine, __version__
from ..libllama import Libllama, LlamaError, Model, find
from ..models import on_gpu, synthetic_model
from ..table import Progress
from ..timeline import Timeline, check_kind
from ..workload import decoding_threads
from .comparison import compare
from .layouts import LAYOUTS, OTHER_CACHES
from .report import cpu, print_restart, print_table, write_figures, write_pictures
from .restart import Conversation, restart_process
from .script import REPEATS


@dataclass(frozen=True)
class Options:
    llama_lib: str | None = None
    model: str | None = None
    json: str | None = None
    picture: str | None = None
    tokens: int | None = None
    device: Devices = "auto"


async def demo(options: Options, progress: Progress) -> bool:
    """Runs all layouts and the restart, prints tables, and writes the files that were asked for.

    Returns True if everything was bit-identical. Raises LlamaError, KvferryError and OSError.
    """
    _check_files(options)
    library = Libllama(find(options.llama_lib))
    progress.say(f"libllama: {library.path} ({library.source}; {library.build})")
    async with Engine(options.device, trace=True) as engine:
        description = engine.describe()
        devices = description["devices"]
        progress.say(f"engine: {', '.join(device['name'] for device in devices)}")
        gpu = on_gpu(description, options.device, library)
        with tempfile.TemporaryDirectory(prefix="kvferry-demo-") as folder:
            rows, timelines = await _run(options, library, engine, gpu, Path(folder), progress)
            restarted = await _restart(options, library, gpu, Path(folder), progress)

    cores, threads = len(os.sched_getaffinity(0)), decoding_threads()
    print_table(rows, cores, threads, gpu)
    if restarted is not None:
        print_restart(restarted)
    if options.picture:
        write_pictures(timelines, restarted, Path(options.picture), progress)
    if options.json:
        report = {
            "kvferry": __version__,
            "libllama": {"path": library.path, "build": library.build, "source": library.source},
            "machine": {"cpu": cpu(), "cores": cores, "decoding_threads": threads},
            "devices": devices,
            "model": options.model or "synthetic",
            "repeats": REPEATS,
            "layouts": rows,
            "restart": restarted,
        }
        write_figures(report, Path(options.json), progress)
    return all(row["bit_identical"] for row in [*rows, restarted] if row is not None)


def _check_files(options: Options) -> None:
    """Finds out now, rather than after all the work, that a file cannot be written."""
    for file in (options.json, options.picture):
        if file and not Path(file).parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "no folder to write to", str(Path(file).parent))
    if options.picture:
        check_kind(Path(options.picture))


async def _run(
    options: Options,
    library: Libllama,
    engine: Engine,
    gpu: bool,
    folder: Path,
    progress: Progress,
) -> tuple[list[dict[str, Any]], list[Timeline]]:
    """The rows and the timelines of all layouts that the model allows."""
    rows: list[dict[str, Any]] = []
    timelines: list[Timeline] = []
    for layout in LAYOUTS if options.model else [*LAYOUTS, *OTHER_CACHES]:
        path = options.model or synthetic_model(folder, layout.kind, layout.sizes, progress)
        try:
            with Model(library, path, gpu=gpu) as model:
                row, timeline = await compare(
                    layout, model, engine, _tokens(options, gpu), progress
                )
        except LlamaError as failure:
            if options.model is None:
                raise
            # Some models need flash attention, or are too large for four sequences.
            progress.say(f"{layout.name}: not with this model: {failure}")
            continue
        rows.append(row)
        timelines.append(timeline)
    if not rows:
        raise LlamaError("this model could be run in none of the layouts")
    return rows, timelines


async def _restart(
    options: Options, library: Libllama, gpu: bool, folder: Path, progress: Progress
) -> dict[str, Any] | None:
    """The figures of a conversation that is several times as long as a layout's."""
    first = LAYOUTS[0]
    path = options.model or synthetic_model(folder, first.kind, first.sizes, progress)
    conversation = Conversation(
        library=library.loaded_as,
        model=str(path),
        gpu=gpu,
        device=options.device,
        tokens=4 * _tokens(options, gpu),
        folder=str(folder / "store"),
    )
    return await restart_process(conversation, progress)


def _tokens(options: Options, gpu: bool) -> int:
    """The length of a layout's prompt."""
    return options.tokens or (4096 if gpu else 512)
