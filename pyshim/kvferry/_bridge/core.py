"""What an engine consists of, and how it is taken down when nobody closed it.

Apart from the Engine that programs hold, and without a reference to it, so that this can do its
work after the Engine has been collected, and at the interpreter's exit.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .._native import ffi, lib
from ..errors import check, error
from ..transfer import Transfer
from .completions import Completions
from .llm import SEQUENCE, LlmObject
from .worker import Call, Worker, WorkerThread

if TYPE_CHECKING:
    from .._native import CData
    from ..llama import LoadTransfer

# How long an exit or a collection may wait for cancelled transfers and for calls that run. Both
# end within a piece or a decode step, milliseconds; this is for when something hangs.
_PATIENCE_SECONDS = 2.0


class Attachment:
    """An engine's attachment to a llama context."""

    def __init__(self, handle: int, address: int, worker: Worker, owner: object) -> None:
        self.handle = handle
        self.address = address
        self.worker = worker
        self.owner = owner  # a llama_cpp.Llama, which frees the context when it is collected
        self.llm = LlmObject.of(owner)
        self.in_flight: dict[Transfer[Any], int] = {}  # and the sequence of each
        # By sequence; None where it has not got as far as a transfer.
        self.latest_loads: dict[int, LoadTransfer | None] = {}
        self.sizes: dict[int, int] = {}  # of sequences' states, as they were last seen
        self.detaching = False
        self._end: Call | None = None

    def measure(self, seq: int) -> int:
        """Size of a sequence's state. On the context's thread."""
        nbytes = ffi.new("uint64_t *")
        check(lib.kvf_llama_size(self.handle, seq, nbytes))
        size: int = nbytes[0]
        self.sizes[seq] = size
        return size

    def llm_of(self, seq: int) -> LlmObject | None:
        """The llama_cpp.Llama that decodes this sequence, and keeps account of it."""
        return self.llm if seq == SEQUENCE else None

    def end(self) -> Call:
        """Asks for the detach, as its last call on the context's thread. May be repeated."""
        self.detaching = True
        if self._end is None:
            self._end = self.worker.make(lib.kvf_llama_detach, self.handle)
        self.worker.ask_for_last(self._end)
        return self._end


class Core:
    """The handle of the C engine and all that lives and dies with it."""

    def __init__(self, handle: int, completions: Completions) -> None:
        self.handle = handle
        self.completions = completions
        self.memory_worker = Worker(completions, WorkerThread("kvferry memory"))
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
        deadline = time.monotonic() + _PATIENCE_SECONDS
        if not (self._stop(deadline) and self._detach(deadline)):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))
            return
        lib.kvf_engine_destroy(self.handle)
        lib.kvf_queue_destroy(self.completions.queue)

    def close(self) -> None:
        """Closes the engine on this thread, once its transfers have ended.

        Raises Busy where tasks of an event loop have some in flight: nobody would tell them.
        """
        self.completions.check_process()
        if self.completions.transfers():
            raise error(lib.KVF_ERR_BUSY, "transfers that tasks wait for")
        self.completions.closing = True
        for attachment in list(self.attachments):
            self.detach(attachment)
        self.memory_worker.halt(math.inf)
        check(lib.kvf_engine_destroy(self.handle))
        self.completions.destroy()
        self.closed = True

    def detach(self, attachment: Attachment) -> None:
        """Detaches on this thread. Raises Busy as ``close`` does."""
        if attachment not in self.attachments:
            return
        if attachment.in_flight:
            raise error(lib.KVF_ERR_BUSY, "transfers that tasks wait for")
        attachment.detaching = True
        with attachment.worker.exclusive():
            check(lib.kvf_llama_detach(attachment.handle))
        attachment.worker.stop()
        self.attachments.remove(attachment)

    def _stop(self, deadline: float) -> bool:
        # First the workers, so that nothing more is submitted.
        for worker in [self.memory_worker, *(each.worker for each in self.attachments)]:
            if not worker.halt(deadline - time.monotonic()):
                return False
        lib.kvf_engine_cancel(self.handle)
        return self.completions.drain_without_loop(deadline - time.monotonic())

    def _detach(self, deadline: float) -> bool:
        # Beside what other engines' attachments run on the context's thread.
        return all(
            each.worker.when_idle(
                functools.partial(lib.kvf_llama_detach, each.handle), deadline - time.monotonic()
            )
            for each in self.attachments
        )


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
