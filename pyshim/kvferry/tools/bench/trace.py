"""A trace of all pieces and decode steps for Perfetto (ui.perfetto.dev) or chrome://tracing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ... import TraceEvent
from ..._bridge.chrome_trace import ChromeTrace
from ..libllama import Step


class Trace:
    """Collects events. Each stage is a process of the trace, with lanes for decode, save, load."""

    def __init__(self) -> None:
        self._trace = ChromeTrace()

    def add(self, stage: str, steps: Iterable[Step], pieces: Sequence[TraceEvent]) -> None:
        process = self._trace.process(stage)
        for lane in ("decode", "save", "load"):
            self._trace.lane(process, lane)
        for step in steps:
            self._trace.span(process, "decode", "decode step", step.begin_ns, step.end_ns, {})
        for piece in pieces:
            arguments = {"job": piece.job, "bytes": piece.bytes, "device": piece.device}
            name = f"{piece.direction} piece"
            self._trace.span(
                process, piece.direction, name, piece.begin_ns, piece.end_ns, arguments
            )

    def write(self, path: Path) -> None:
        self._trace.write(path)
