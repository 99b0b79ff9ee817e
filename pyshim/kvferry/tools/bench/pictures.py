"""The pictures of the benchmark, 1200 pixels wide: times by layout, decode steps with and without
transfers, and bytes moved by the turns of a conversation. (``kvferry.tools.timeline`` draws the
timeline.)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..table import ms

# Each way of moving a state, and its colour.
WAYS = {
    "raw copy": "#b8b8b8",
    "kvferry, urgent": "#4c72b0",
    "kvferry, ahead": "#8aa6d6",
    "llama.cpp, pinned": "#dd8452",
    "llama.cpp, pageable": "#eeb38f",
}


@dataclass(frozen=True)
class Bars:
    """Milliseconds of a layout's save or load, by way. Ways that have failed are missing."""

    label: str
    ms: dict[str, float]


@dataclass(frozen=True)
class Latencies:
    """Milliseconds of decode steps."""

    label: str
    idle: Sequence[float]
    during: Sequence[float]


@dataclass(frozen=True)
class Growth:
    """MiB that the save after each turn of a conversation moves, by the conversation's length."""

    label: str
    tokens: Sequence[int]
    states: Sequence[float]
    blocks: Sequence[float]


def draw_bars(bars: Sequence[Bars], path: Path, *, heading: str) -> None:
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(
        figsize=(12, 1.4 + 0.95 * len(bars)), dpi=100, layout="constrained"
    )
    height = 0.8 / len(WAYS)
    for way, colour in WAYS.items():
        shown = [(index, bar.ms[way]) for index, bar in enumerate(bars) if way in bar.ms]
        positions = []
        for index, _ in shown:  # leaves no gap where a way is missing
            ways = [each for each in WAYS if each in bars[index].ms]
            positions.append(index + (ways.index(way) - (len(ways) - 1) / 2) * height)
        drawn = axis.barh(
            positions, [value for _, value in shown], height * 0.92, color=colour, label=way
        )
        axis.bar_label(
            drawn, [f"{ms(value)} ms" for _, value in shown], padding=4, fontsize=9, color="#333333"
        )
    axis.set_yticks(range(len(bars)), [bar.label for bar in bars], fontsize=10)
    axis.set_ylim(len(bars) - 0.45, -0.55)
    # Logarithmic, because times go from microseconds to seconds.
    axis.set_xscale("log")
    smallest = min(value for bar in bars for value in bar.ms.values())
    largest = max(value for bar in bars for value in bar.ms.values())
    axis.set_xlim(smallest / 3, largest * 2.5)
    axis.set_xlabel("milliseconds, logarithmic: shorter is better", fontsize=10)
    axis.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(WAYS), fontsize=9, frameon=False
    )
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(heading, fontsize=13, fontweight="bold", x=0.01, ha="left")
    figure.savefig(path)
    pyplot.close(figure)


def draw_latencies(latencies: Sequence[Latencies], path: Path, *, heading: str) -> None:
    """Draws the share of steps over their time; the curves agree if transfers cost nothing."""
    from matplotlib import pyplot

    columns = min(3, len(latencies))
    rows = -(-len(latencies) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(12, 4.0 * rows), dpi=100, squeeze=False, layout="constrained"
    )
    for unused in axes.flat[len(latencies) :]:
        unused.set_axis_off()
    for axis, each in zip(axes.flat, latencies, strict=False):
        curves = (("alone", each.idle, "#4c72b0"), ("beside transfers", each.during, "#dd8452"))
        for label, values, colour in curves:
            ordered = sorted(values)
            shares = [100 * (index + 1) / len(ordered) for index in range(len(ordered))]
            axis.step(ordered, shares, where="post", color=colour, label=label, linewidth=1.8)
        axis.set_title(each.label, fontsize=10.5, loc="left")
        axis.set_xlabel("milliseconds a decode step", fontsize=10)
        axis.set_ylim(0, 101)
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(loc="lower right", fontsize=9, frameon=False)
    for first in axes[:, 0]:
        first.set_ylabel("% of steps at most so long", fontsize=10)
    figure.suptitle(heading, fontsize=13, fontweight="bold", x=0.01, ha="left")
    figure.savefig(path)
    pyplot.close(figure)


def draw_growth(growth: Growth, path: Path, *, heading: str) -> None:
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(12, 4.6), dpi=100, layout="constrained")
    curves = (
        ("whole state", growth.states, "#dd8452"),
        ("blocks: what is new", growth.blocks, "#4c72b0"),
    )
    for label, values, colour in curves:
        axis.plot(growth.tokens, values, color=colour, linewidth=2.2, marker="o", markersize=4)
        axis.fill_between(growth.tokens, values, color=colour, alpha=0.12)
        axis.annotate(
            f"{label}\n{values[-1]:,.0f} MiB a turn",
            (growth.tokens[-1], values[-1]),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            fontsize=10.5,
            color=colour,
            fontweight="bold",
        )
    axis.set_xlim(0, growth.tokens[-1] * 1.22)
    axis.set_ylim(0, max(growth.states) * 1.08)
    axis.set_xlabel("tokens of the conversation", fontsize=10)
    axis.set_ylabel("MiB moved by the save after a turn", fontsize=10)
    axis.set_xticks([tick for tick in axis.get_xticks() if tick <= growth.tokens[-1]])
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(growth.label, fontsize=10.5, loc="left")
    figure.suptitle(heading, fontsize=13, fontweight="bold", x=0.01, ha="left")
    figure.savefig(path)
    pyplot.close(figure)
