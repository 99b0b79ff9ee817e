"""The limits of the benchmark: plain copies by memcpy, or by the CUDA driver."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable
from typing import Protocol

from ..limits import Direction, Pace, RawCuda, memcpy_seconds


class Raw(Protocol):
    """Plain copies of as many bytes as a state has. Methods return seconds.

    Buffers that hold the state hold it afterwards too.
    """

    def save_seconds(self, nbytes: int | None = None) -> float:
        """Copies the first ``nbytes`` bytes, or all."""

    def load_seconds(self, nbytes: int | None = None) -> float:
        """Likewise."""

    def both_seconds(self, other: int) -> float:
        """Saves and loads at the same time. ``other`` is the pinned buffer that is loaded."""

    def rows_seconds(
        self, direction: Direction, width: int, pitch: int, copies: int
    ) -> float | None:
        """Copies as many bytes by ``copies`` copies of rows, ``width`` bytes wide and ``pitch``
        bytes apart on the device. Returns None where there are no such copies."""

    @property
    def paced(self) -> Callable[[Direction, Pace, threading.Event], None] | None:
        """Copies again and again at a pace until the event is set; None where there is no pace."""

    def close(self) -> None: ...


class RawMaker(Protocol):
    name: str

    def __call__(self, pinned: int, pageable: int, nbytes: int) -> Raw:
        """Makes copies of buffers at these addresses, which hold the state."""

    def device_free_bytes(self) -> int | None:
        """Returns the free bytes of device memory; None where there is none."""


class Memcpy:
    """Makes copies from host memory to host memory, by as many threads as the engine uses."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self.name = f"memcpy by {threads} thread(s)"

    def __call__(self, pinned: int, pageable: int, nbytes: int) -> _HostCopies:
        return _HostCopies(self._threads, pinned, pageable, nbytes)

    def device_free_bytes(self) -> int | None:
        return None


class _HostCopies:
    def __init__(self, threads: int, pinned: int, pageable: int, nbytes: int) -> None:
        self._threads, self._nbytes = threads, nbytes
        self._pinned, self._pageable = pinned, pageable

    def save_seconds(self, nbytes: int | None = None) -> float:
        nbytes = nbytes or self._nbytes
        return memcpy_seconds(self._pinned, self._pageable, nbytes, self._threads)

    def load_seconds(self, nbytes: int | None = None) -> float:
        nbytes = nbytes or self._nbytes
        return memcpy_seconds(self._pageable, self._pinned, nbytes, self._threads)

    def both_seconds(self, other: int) -> float:
        raise NotImplementedError("one memory has no two directions")

    def rows_seconds(
        self, direction: Direction, width: int, pitch: int, copies: int
    ) -> float | None:
        return None

    paced = None

    def close(self) -> None:
        pass


class PinnedCopies:
    """Makes copies between device and pinned host memory, by the driver's own calls."""

    name = "raw pinned copy"

    def __init__(self, cuda: RawCuda) -> None:
        self._cuda = cuda

    def __call__(self, pinned: int, pageable: int, nbytes: int) -> _DeviceCopies:
        return _DeviceCopies(self._cuda, pinned, nbytes)

    def device_free_bytes(self) -> int | None:
        return self._cuda.free_bytes()


class _DeviceCopies:
    def __init__(self, cuda: RawCuda, pinned: int, nbytes: int) -> None:
        self._cuda, self._pinned, self._nbytes = cuda, pinned, nbytes
        self._source = cuda.allocate(nbytes)
        self._target = cuda.allocate(nbytes)
        # A save must not change the buffer, so the device gets the same bytes.
        cuda.load_seconds(self._source, pinned, nbytes)

    def save_seconds(self, nbytes: int | None = None) -> float:
        return self._cuda.save_seconds(self._pinned, self._source, nbytes or self._nbytes)

    def load_seconds(self, nbytes: int | None = None) -> float:
        return self._cuda.load_seconds(self._target, self._pinned, nbytes or self._nbytes)

    def both_seconds(self, other: int) -> float:
        return self._cuda.both_seconds(
            self._pinned, self._source, self._target, other, self._nbytes
        )

    def rows_seconds(
        self, direction: Direction, width: int, pitch: int, copies: int
    ) -> float | None:
        rows = self._nbytes // width // copies
        device = self._cuda.allocate(copies * rows * pitch)
        host = self._cuda.allocate_host(copies * rows * width)
        try:
            return statistics.median(
                self._cuda.rows_seconds(direction, device, host, width, pitch, rows, copies)
                for _ in range(10)
            )
        finally:
            self._cuda.free_host(host)
            self._cuda.free(device)

    def paced(self, direction: Direction, pace: Pace, stop: threading.Event) -> None:
        device = self._source if direction == "save" else self._target
        self._cuda.paced(direction, device, self._pinned, self._nbytes, pace, stop)

    def close(self) -> None:
        self._cuda.free(self._source)
        self._cuda.free(self._target)
