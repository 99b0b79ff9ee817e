"""Ways to keep a transfer in flight until a test releases it."""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from support import c_interface
from support.devices import ON_GPU
from support.llama_reference import Context
from support.simulated_cuda import Stream


class Releasable(Protocol):
    def release(self) -> None:
        """May be called repeatedly, and from any thread."""


class Hold(Releasable, Protocol):
    """A transfer that is submitted with `options` does not move until `release`."""

    options: dict[str, Any]

    def holds(self, nbytes: int) -> bool:
        """Whether it can hold a transfer of so many bytes."""


class NoHold:
    """Holds nothing: transfers move at once."""

    def __init__(self, priority: int = 0) -> None:
        self.options: dict[str, Any] = {"priority": priority}

    def holds(self, nbytes: int) -> bool:
        return False

    def release(self) -> None:
        pass


class ByStream:
    """Holds by a stream that the transfer follows. Bytes that the submitting call moves itself wait
    as well."""

    def __init__(self, stream: Stream, priority: int = 0) -> None:
        self._stream = stream
        self.options: dict[str, Any] = {"stream": stream.handle, "priority": priority}
        stream.hold()

    def holds(self, nbytes: int) -> bool:
        return True

    def release(self) -> None:
        self._stream.release()


class ByUrgentCopies:
    """Holds by an urgent copy of some seconds in the same engine, which has one copy thread:
    background jobs on host memory wait until urgent ones have ended. Bytes that the submitting call
    moves itself move at once.
    """

    _PIECE = 4 << 20
    _PIECES = 5000

    def __init__(self, engine: c_interface.Engine) -> None:
        self.options: dict[str, Any] = {"priority": 0}
        pieces = [ctypes.create_string_buffer(self._PIECE) for _ in range(3)]
        # In random order, so that they do not become rows of one region.
        choose = random.Random(0)
        regions = (c_interface.Region * self._PIECES)()
        for region in regions:
            region.address = ctypes.addressof(choose.choice(pieces[1:]))
            region.width = self._PIECE
            region.rows = 1
        self._pieces = pieces
        self._job: c_interface.Job | None = engine.save_regions(regions, pieces[0], priority=1)
        self._lock = threading.Lock()

    def holds(self, nbytes: int) -> bool:
        # The submitting call itself copies smaller states.
        return nbytes > 32 << 10

    def release(self) -> None:
        with self._lock:
            job, self._job = self._job, None
            if job:
                job.cancel()
                job.wait()


@contextmanager
def released_after(seconds: float, *holds: Releasable) -> Iterator[threading.Event]:
    """Releases holds after ``seconds``, if the ``with`` block lasts so long because it waits for
    them. Gives an event that is set then.
    """
    waited = threading.Event()

    def release() -> None:
        waited.set()
        for hold in holds:
            hold.release()

    timer = threading.Timer(seconds, release)
    timer.start()
    try:
        yield waited
    finally:
        timer.cancel()
        timer.join()


def free_beside(context: Context, hold: Releasable) -> bool:
    """Frees a context, one of whose transfers a hold keeps in flight. Returns whether the transfer
    was held all the time.

    kvferry must not wait for the hold. On a GPU libllama does: it frees device memory, and
    ``cudaFree`` waits for all that the device has been given. There the hold is released after a
    second.
    """
    with released_after(1 if ON_GPU else 60, hold) as waited:
        context.close()
    was_held = not waited.is_set()
    assert was_held or ON_GPU
    return was_held


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.0005)
