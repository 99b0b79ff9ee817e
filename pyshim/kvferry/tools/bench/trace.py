"""A trace of all pieces and decode steps for Perfetto (ui.perfetto.dev) or chrome://tracing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ... import TraceEvent
from ..libllama import Step

_LANES = {"decode": 1, "save": 2, "load": 3}


class Trace:
    """Collects events. Each stage is a process of the trace, with lanes for decode, save, load."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._stages = 0

    def add(self, stage: str, steps: Iterable[Step], pieces: Sequence[TraceEvent]) -> None:
        self._stages += 1
        self._name("process_name", 0, stage)
        for name, number in _LANES.items():
            self._name("thread_name", number, name)
        for step in steps:
            self._event("decode step", _LANES["decode"], step.begin_ns, step.end_ns, {})
        for piece in pieces:
            arguments = {"job": piece.job, "bytes": piece.bytes, "device": piece.device}
            lane = _LANES[piece.direction]
            self._event(f"{piece.direction} piece", lane, piece.begin_ns, piece.end_ns, arguments)

    def _name(self, what: str, thread: int, name: str) -> None:
        self._events.append(
            {"ph": "M", "name": what, "pid": self._stages, "tid": thread, "args": {"name": name}}
        )

    def _event(
        self, name: str, lane: int, begin_ns: int, end_ns: int, arguments: dict[str, Any]
    ) -> None:
        # The format has microseconds.
        self._events.append(
            {
                "ph": "X",
                "name": name,
                "pid": self._stages,
                "tid": lane,
                "ts": begin_ns / 1e3,
                "dur": (end_ns - begin_ns) / 1e3,
                "args": arguments,
            }
        )

    def write(self, path: Path) -> None:
        path.write_text(json.dumps({"traceEvents": self._events, "displayTimeUnit": "ms"}))
