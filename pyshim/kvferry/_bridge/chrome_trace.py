"""Files in Chrome's JSON format of traces, which Perfetto (ui.perfetto.dev) opens."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any


class ChromeTrace:
    """Collects spans, in lanes of processes. Both are only names."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._processes = 0
        self._lanes: dict[tuple[int, str], int] = {}

    def process(self, name: str) -> int:
        """Begins a process, and returns its number."""
        self._processes += 1
        self._name("process_name", self._processes, 0, name)
        return self._processes

    def lane(self, process: int, name: str) -> int:
        """Returns the number of a lane, which this makes if it is new."""
        known = self._lanes.get((process, name))
        if known is None:
            known = self._lanes[process, name] = len(self._lanes) + 1
            self._name("thread_name", process, known, name)
        return known

    def span(
        self,
        process: int,
        lane: str,
        name: str,
        begin_ns: int,
        end_ns: int,
        arguments: Mapping[str, int | str],
    ) -> None:
        # The format has microseconds.
        self._events.append(
            {
                "ph": "X",
                "name": name,
                "pid": process,
                "tid": self.lane(process, lane),
                "ts": begin_ns / 1e3,
                "dur": (end_ns - begin_ns) / 1e3,
                "args": dict(arguments),
            }
        )

    def write(self, path: str | os.PathLike[str]) -> None:
        """Raises OSError."""
        with open(path, "w") as file:
            json.dump({"traceEvents": self._events, "displayTimeUnit": "ms"}, file)

    def _name(self, what: str, process: int, lane: int, name: str) -> None:
        self._events.append(
            {"ph": "M", "name": what, "pid": process, "tid": lane, "args": {"name": name}}
        )
