"""The pieces that an engine has moved, as the C library records them."""

from __future__ import annotations

from typing import Literal, NamedTuple

from .._native import ffi, lib
from ..errors import check


class TraceEvent(NamedTuple):
    """One piece that moved. Times are nanoseconds of ``time.monotonic_ns()``."""

    job: int
    begin_ns: int
    end_ns: int
    bytes: int
    device: int
    """Index into ``describe()["devices"]``."""
    direction: Literal["save", "load"]


def take_trace(engine: int) -> list[TraceEvent]:
    """Takes the pieces that the engine with this handle has recorded, oldest first."""
    capacity = 4096
    records = ffi.new("kvf_trace_event[]", capacity)
    events: list[TraceEvent] = []
    while True:
        count = check(
            lib.kvf_engine_trace(engine, records, ffi.sizeof("kvf_trace_event"), capacity)
        )
        for index in range(count):
            record = records[index]
            events.append(
                TraceEvent(
                    record.job,
                    record.begin_ns,
                    record.end_ns,
                    record.bytes,
                    record.device,
                    "load" if record.direction else "save",
                )
            )
        if count < capacity:
            return events
