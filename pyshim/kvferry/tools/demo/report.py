"""What the demonstration prints and writes."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

from ..table import Progress, mib, ms, table
from ..timeline import Timeline, draw
from .restart_picture import draw_restart
from .script import REPEATS

_HEADER = [
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


_TURN_HEADER = [
    "save after\na turn",
    "tokens of\nthe turn",
    "MiB whole\nstate",
    "\nblocks",
    "ms whole\nstate",
    "\nblocks",
]


_RESTART_HEADER = [
    "restarted\nprocess",
    "prompt\ntokens",
    "kept\nMiB",
    "keep\nms",
    "answer ms\nby prefill",
    "from\nthe folder",
    "of which\nrestore",
    "times\nsooner",
    "bit_\nidentical",
]


def _turn_line(row: dict[str, Any]) -> list[str]:
    """The figures of a turn, in the order of its header."""
    known = row["turn_bytes"] is not None
    return [
        row["layout"],
        str(row["turn_tokens"]),
        mib(row["state_bytes"]),
        mib(row["turn_bytes"]) + "*" * row["turn_checkpoint"] if known else "-",
        ms(row["save_ms"]),
        ms(row["turn_ms"]) if known else "-",
    ]


def _line(row: dict[str, Any]) -> list[str]:
    """The figures of a layout, in the order of the header."""
    return [
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
        _steps(row, "idle"),
        _steps(row, "during_transfers"),
        str(row["bit_identical"]).lower(),
    ]


def _steps(row: dict[str, Any], when: str) -> str:
    if not row["decode_steps"][when]:
        return "-"  # the transfers ended between two steps
    return f"{ms(row['decode_p50_ms'][when])}/{ms(row['decode_p99_ms'][when])}"


def print_table(rows: list[dict[str, Any]], cores: int, threads: int, gpu: bool) -> None:
    print(f"\n{table(_HEADER, [_line(row) for row in rows])}\n", flush=True)
    print(f"{table(_TURN_HEADER, [_turn_line(row) for row in rows])}\n", flush=True)
    if any(row["turn_checkpoint"] for row in rows):
        print("* with a checkpoint of the sliding windows or the recurrent layers")
    print(
        f"Medians of {REPEATS}. save, load: with nothing else running, from the call to the "
        "completion; kvferry's are urgent.\nbeside: decode steps of another sequence while kvferry "
        "saves and loads in the background.\nprefill: all prompts of the layout."
    )
    if not gpu:
        print(
            "The cache is in host memory here, so that transfers and decoding share the same "
            f"{cores} cores\n(decoding uses {threads}). This shows that the bytes are right and "
            "that decoding goes on, not how fast a GPU is."
        )


def print_restart(row: dict[str, Any]) -> None:
    line = [
        "",
        f"{row['tokens']:,}",
        mib(row["state_bytes"]),
        ms(row["keep_ms"]),
        ms(row["prefill_ms"]),
        ms(row["answer_ms"]),
        ms(row["restore_ms"]),
        f"{row['prefill_ms'] / row['answer_ms']:.1f}",
        str(row["bit_identical"]).lower(),
    ]
    print(f"\n{table(_RESTART_HEADER, [line])}\n")
    print(
        "A process decodes a prompt, keeps it in a folder, and ends. A new process finds it by its "
        f"tokens\nand decodes what follows. Of {row['tokens']:,} tokens it had to prefill "
        f"{row['tokens'] - row['restored_tokens']:,}. keep: until all is on the disk.",
        flush=True,
    )


def write_figures(report: dict[str, Any], path: Path, progress: Progress) -> None:
    path.write_text(json.dumps(report, indent=2) + "\n")
    progress.say(f"figures: {path}")


def write_pictures(
    timelines: list[Timeline], restarted: dict[str, Any] | None, path: Path, progress: Progress
) -> None:
    """Writes the timelines to ``path``, and the restart beside it."""
    paths = [path]
    try:
        draw(timelines, path, heading="kvferry demo: decoding goes on while a sequence is moved")
        if restarted is not None:
            paths.append(path.with_stem(f"{path.stem}-restart"))
            draw_restart(restarted, paths[-1])
    except ImportError:
        progress.say("no picture: pip install matplotlib")
        return
    for each in paths:
        progress.say(f"picture: {each}")


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown")
