"""A file for Perfetto of what a store and an engine have recorded."""

from __future__ import annotations

import os
from collections.abc import Iterable

from ._bridge.chrome_trace import ChromeTrace
from ._bridge.trace import TraceEvent
from .store.tracing import TraceSpan


def write_trace(
    path: str | os.PathLike[str],
    spans: Iterable[TraceSpan] = (),
    pieces: Iterable[TraceEvent] = (),
) -> None:
    """Writes a trace in Chrome's JSON format, which https://ui.perfetto.dev opens.

    ``spans`` are of ``Store.trace()``, ``pieces`` of ``Engine.trace()``. Both have the time of
    ``time.monotonic_ns()``. Pieces that move at the same time stand in several lanes. Raises
    OSError.
    """
    trace = ChromeTrace()
    store = trace.process("store")
    for span in spans:
        trace.span(store, span.lane, span.name, span.begin_ns, span.end_ns, span.arguments)
    engine = trace.process("engine")
    busy: dict[tuple[str, int], list[int]] = {}  # by direction and device, when each lane is free
    for piece in sorted(pieces, key=lambda piece: (piece.begin_ns, -piece.end_ns)):
        ends = busy.setdefault((piece.direction, piece.device), [])
        number = next((n for n, end in enumerate(ends) if end <= piece.begin_ns), len(ends))
        ends[number : number + 1] = [piece.end_ns]
        lane = f"{piece.direction}, device {piece.device}"
        if number:
            lane += f" ({number + 1})"
        arguments = {"job": piece.job, "bytes": piece.bytes}
        name = f"{piece.direction} piece"
        trace.span(engine, lane, name, piece.begin_ns, piece.end_ns, arguments)
    trace.write(path)
