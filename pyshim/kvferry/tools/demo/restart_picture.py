"""The picture of a conversation that outlives its process: when each process has an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_PREFILL = "#c44e52"
_RESTORE = "#55a868"
_DECODE = "#4c72b0"


def draw_restart(row: dict[str, Any], path: Path) -> None:
    """Writes a picture of the figures of ``restart_process``, 1200 pixels wide.

    Raises ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    prefill, answer, restore = (row[f"{name}_ms"] for name in ("prefill", "answer", "restore"))
    figure, axis = pyplot.subplots(figsize=(12, 2.9), dpi=100, layout="constrained")
    figure.suptitle(
        f"The first answer after a restart: a prompt of {row['tokens']:,} tokens, kept in a folder",
        fontsize=13,
        fontweight="bold",
        x=0.01,
        ha="left",
    )
    axis.barh(1, prefill, color=_PREFILL, height=0.6)
    axis.barh(0, restore, color=_RESTORE, height=0.6)
    axis.barh(0, answer - restore, left=restore, color=_DECODE, height=0.6)
    for lane, milliseconds, more in (
        (1, prefill, ""),
        (0, answer, f", {prefill / answer:.1f} times sooner"),
    ):
        axis.annotate(
            f" {milliseconds:,.0f} ms{more}",
            (milliseconds, lane),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=12,
        )
    axis.set_yticks([1, 0], ["llama.cpp,\nprefilled again", "kvferry.Store,\nnew process"])
    axis.tick_params(axis="y", length=0, labelsize=11)
    axis.set_ylim(-0.5, 1.5)
    axis.set_xlim(0, 1.15 * max(prefill, answer))
    axis.set_xlabel("milliseconds until the first answer", fontsize=10)
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    key = [
        Patch(color=_PREFILL, label="prefill"),
        Patch(color=_RESTORE, label="open the store, find, read, load"),
        Patch(color=_DECODE, label="decode what follows the prompt"),
    ]
    figure.legend(handles=key, loc="outside lower left", ncols=3, fontsize=9, frameon=False)
    figure.savefig(path)
    pyplot.close(figure)
