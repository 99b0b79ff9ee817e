"""Tables and progress on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)
) -> str:
    """Returns lines of aligned text.

    A header may have several lines. ``left`` lists the columns that are aligned to the left.
    """
    heads = [text.split("\n") for text in header]
    depth = max(len(lines) for lines in heads)
    head_rows = [
        [([""] * (depth - len(lines)) + lines)[line] for lines in heads] for line in range(depth)
    ]
    everything = [*head_rows, *rows]
    widths = [max(len(row[column]) for row in everything) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = (
            text.ljust(width) if column in left else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([*map(line, head_rows), rule, *map(line, rows)])


class Progress:
    """Prints to standard error what happens, with the seconds since the start."""

    def __init__(self) -> None:
        self._begin = time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._begin:6.1f} s] {text}", file=sys.stderr, flush=True)


class StatusLine:
    """A line that changes, on standard error if that is a terminal. Elsewhere nothing is shown."""

    def show(self, text: str) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{text}\x1b[K")
            sys.stderr.flush()

    def clear(self) -> None:
        self.show("")


def ms(value: float) -> str:
    """Formats milliseconds with about three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def mib(nbytes: float) -> str:
    """Formats bytes as MiB, with about three digits."""
    value = nbytes / 2**20
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"
