"""What an engine consists of, and how it is taken down when nobody closed it.

Apart from the Engine that programs hold, and without a reference to it, so that this can do its
work after the Engine has been collected, and at the interpreter's exit.
"""

from __future__ import annotations

import ctypes
import json
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ._native import ffi, lib
from .completions import Completions
from .errors import check
from .transfer import Transfer
from .worker import Call, Worker

if TYPE_CHECKING:
    from ._native import CData

# How long an exit or a collection may wait for cancelled transfers and for calls that run. Both
# end within a piece or a decode step, milliseconds; this is for when something hangs.
_PATIENCE_SECONDS = 2.0


class Attachment:
    """A llama context that an engine is attached to."""

    def __init__(self, handle: int, worker: Worker, owner: object) -> None:
        self.handle = handle
        self.worker = worker
        self.owner = owner  # a llama_cpp.Llama, which frees the context when it is collected
        self.in_flight: dict[Transfer[Any], int] = {}  # and the sequence of each
        self.detaching = False
        self._end: Call | None = None

    def end(self) -> Call:
        """Asks for the detach, as the last call of the context's thread."""
        self.detaching = True
        if self._end is None:
            self._end = self.worker.post(lib.kvf_llama_detach, self.handle)
            self.worker.stop()
        return self._end


class Core:
    """The handle of the C engine and all that lives and dies with it."""

    def __init__(self, handle: int, completions: Completions) -> None:
        self.handle = handle
        self.completions = completions
        self.memory_worker = Worker("kvferry memory", completions)
        self.attachments: list[Attachment] = []
        self.closed = False
        self._process = os.getpid()

    def is_inherited(self) -> bool:
        """True in a forked child, which has these objects but none of the threads behind them."""
        return os.getpid() != self._process

    def abandon(self) -> None:
        """Cancels what is in flight and takes the engine down, within a bounded time.

        For finalizers, on any thread. If the time is not enough everything is left as it is, and
        alive: memory must never be freed under a transfer.
        """
        if self.closed or self.is_inherited():
            return
        self.closed = True
        if not self._stop(time.monotonic() + _PATIENCE_SECONDS):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))
            return
        for attachment in self.attachments:
            lib.kvf_llama_detach(attachment.handle)
        lib.kvf_engine_destroy(self.handle)
        lib.kvf_queue_destroy(self.completions.queue)

    def _stop(self, deadline: float) -> bool:
        # First the workers, so that nothing more is submitted.
        for worker in [self.memory_worker, *(each.worker for each in self.attachments)]:
            if not worker.halt(deadline - time.monotonic()):
                return False
        lib.kvf_engine_cancel(self.handle)
        return self.completions.drain_without_loop(deadline - time.monotonic())


def describe(function: Callable[[int, CData, int, CData], int], handle: int) -> dict[str, Any]:
    """Calls kvf_engine_describe or kvf_llama_describe."""
    needed = ffi.new("uint64_t *", 4096)
    while True:
        capacity = needed[0]
        text = ffi.new("char[]", capacity)
        status = function(handle, text, capacity, needed)
        if status == lib.KVF_ERR_BUFFER_TOO_SMALL:
            continue
        check(status)
        description: dict[str, Any] = json.loads(ffi.string(text))
        return description
