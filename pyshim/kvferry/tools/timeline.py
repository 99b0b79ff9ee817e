"""The picture of a run over time: decode steps, and below them the pieces of transfers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .._bridge.arguments import invalid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .. import TraceEvent
    from .libllama import Step

# Two shades of each colour in turn, so that even narrow neighbours can be distinguished.
_STEPS = ("#4c72b0", "#7f9bc9")
_PIECES = {"save": ("#dd8452", "#eeb38f"), "load": ("#55a868", "#94caa2")}
_CALL = "#555555"
_IN_FLIGHT = "#e9e9e9"
_LANES: dict[Literal["save", "load"], int] = {"save": 1, "load": 0}
_THINNEST_PIXELS = 1.0


@dataclass(frozen=True)
class Span:
    """A transfer. All times are nanoseconds of ``time.monotonic_ns()``."""

    direction: Literal["save", "load"]
    submitted_ns: int
    recorded_ns: int
    """When the submitting call returned: until then it kept the context's thread busy."""
    finished_ns: int


@dataclass(frozen=True)
class Timeline:
    """The content of one panel. Times are nanoseconds of ``time.monotonic_ns()``."""

    title: str
    begin_ns: int
    end_ns: int
    steps: Sequence[Step]
    spans: Sequence[Span]
    pieces: Sequence[TraceEvent]


def check_kind(path: Path) -> None:
    """Raises InvalidArgument for a file name whose ending is no kind of picture.

    Does nothing without matplotlib: then no picture is drawn.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        return
    kinds = sorted(f".{kind}" for kind in FigureCanvasBase.get_supported_filetypes())
    if path.suffix and path.suffix.lower() not in kinds:
        raise invalid(f"{path} ends in no kind of picture: {', '.join(kinds)}")


def draw(timelines: Sequence[Timeline], path: Path, *, heading: str) -> None:
    """Writes a picture of the panels, one below the other, 1200 pixels wide.

    Raises ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    figure, axes = pyplot.subplots(
        len(timelines),
        1,
        figsize=(12, 1.2 + 1.75 * len(timelines)),
        dpi=100,
        squeeze=False,
        layout="constrained",
    )
    figure.suptitle(heading, fontsize=13, fontweight="bold", x=0.01, ha="left")
    for axis, timeline in zip(axes[:, 0], timelines, strict=True):
        _panel(axis, timeline)
    axes[-1, 0].set_xlabel("milliseconds", fontsize=10)
    key = [
        Patch(color=_STEPS[0], label="a decode step (sequence 1)"),
        Patch(color=_CALL, label="the submitting call: records the layout"),
        Patch(color=_PIECES["save"][0], label="a piece saved (sequence 0)"),
        Patch(color=_PIECES["load"][0], label="a piece loaded (sequence 2)"),
        Patch(color=_IN_FLIGHT, label="in flight"),
    ]
    figure.legend(handles=key, loc="outside lower left", ncols=5, fontsize=9, frameon=False)
    figure.savefig(path)
    pyplot.close(figure)


def _panel(axis: Axes, timeline: Timeline) -> None:
    milliseconds = (timeline.end_ns - timeline.begin_ns) / 1e6
    thinnest = _THINNEST_PIXELS * milliseconds / 1000  # the axis is about 1000 pixels wide

    def bars(
        spans: Sequence[tuple[int, int]], lane: int, shades: Sequence[str], height: float = 0.72
    ) -> None:
        shown = [(max(b, timeline.begin_ns), min(e, timeline.end_ns)) for b, e in sorted(spans)]
        shown = [(begin, end) for begin, end in shown if begin < end]
        axis.broken_barh(
            [
                ((begin - timeline.begin_ns) / 1e6, max((end - begin) / 1e6, thinnest))
                for begin, end in shown
            ],
            (lane - height / 2, height),
            facecolors=[shades[index % len(shades)] for index in range(len(shown))],
            linewidth=0,
        )

    bars([(step.begin_ns, step.end_ns) for step in timeline.steps], 2, _STEPS)
    for direction, lane in _LANES.items():
        transfers = [span for span in timeline.spans if span.direction == direction]
        moved = [piece for piece in timeline.pieces if piece.direction == direction]
        bars([(span.submitted_ns, span.finished_ns) for span in transfers], lane, [_IN_FLIGHT])
        bars([(span.submitted_ns, span.recorded_ns) for span in transfers], lane, [_CALL], 0.3)
        bars([(piece.begin_ns, piece.end_ns) for piece in moved], lane, _PIECES[direction], 0.5)
    axis.set_title(timeline.title, fontsize=10.5, loc="left")
    axis.set_yticks([2, 1, 0], ["decode", "save", "load"], fontsize=10)
    axis.set_ylim(-0.5, 2.5)
    axis.set_xlim(0, milliseconds)
    axis.tick_params(axis="x", labelsize=9)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
