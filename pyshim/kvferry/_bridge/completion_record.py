"""How a transfer ended, as the C library reports it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from .._native import ffi, lib

if TYPE_CHECKING:
    from .._native import CData


class Completion(NamedTuple):
    """How a transfer ended. Times are nanoseconds of ``time.monotonic_ns()``."""

    status: int
    """``KVF_OK`` (0) or a negative ``kvf_status``."""
    mode: int
    """How a sequence's transfer was done: a ``KVF_SAVE_*`` (1 in place, 2 from a snapshot) or a
    ``KVF_LOAD_*`` (16 in place, 17 ahead). 0 for other transfers."""
    bytes: int
    """Size of the state or of the regions."""
    fragments: int
    """How many separate runs of tensor memory it consists of."""
    segments: int
    """How many pieces remained after runs and rows had been joined."""
    submitted_ns: int
    started_ns: int
    """When the first piece began to move; 0 if no piece moved."""
    finished_ns: int
    listed_ns: int
    """When libllama had taken cells and listed the fragments of a sequence. 0 for regions."""
    recorded_ns: int
    """When libllama had named the last fragment of a sequence. 0 for regions."""
    detail: str
    """One line that says what went wrong, or ""."""


def completion_of(record: CData) -> Completion:
    """Reads a ``kvf_completion``."""
    return Completion(
        record.status,
        record.mode,
        record.bytes,
        record.fragments,
        record.segments,
        record.submitted_ns,
        record.started_ns,
        record.finished_ns,
        record.listed_ns,
        record.recorded_ns,
        "" if record.status == lib.KVF_OK else ffi.string(record.detail).decode(errors="replace"),
    )
