"""What an engine consists of, and how it is taken down.

A core has no reference to the engine object that a program holds. So it can do its work after that
object has been collected, and at the interpreter's exit.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import anyio.lowlevel

from .._native import lib
from ..errors import check, error
from .attachment import Attachment
from .completions import Completions
from .description import describe
from .trace import TraceEvent, take_trace
from .worker import Worker, WorkerThread

T = TypeVar("T")

# How long an exit or a collection may wait for cancelled transfers and for calls that run. Both
# end within a piece or a decode step, milliseconds; this is for when something hangs.
_PATIENCE_SECONDS = 2.0


class EngineCore:
    """The handle of the C engine, and all that lives and dies with it."""

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

    # ---- For callers on an event loop -----------------------------------------------------------

    async def check_ready(self) -> None:
        """Checks that the engine can be used here. A cancellation that is pending comes first.

        Raises Forked, EngineClosed, RuntimeError beside another event loop.
        """
        self.completions.check_usable()
        self.completions.check_waitable()
        await anyio.lowlevel.checkpoint_if_cancelled()

    async def on_memory_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Makes a call that blocks, with the engine's handle, on a thread of the engine's own."""
        await self.check_ready()
        return await self.memory_worker.call(function, self.handle, *arguments)

    # ---- Looking inside -------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """What ``kvf_engine_describe`` says. Raises Forked, EngineClosed."""
        self._check_open()
        return describe(lib.kvf_engine_describe, self.handle)

    def trace(self) -> list[TraceEvent]:
        """Takes the recorded pieces. Raises Forked, EngineClosed."""
        self._check_open()
        return take_trace(self.handle)

    def _check_open(self) -> None:
        """Raises as ``describe`` does: an engine that is closing can still be described."""
        self.completions.check_process()
        if self.closed:
            raise error(lib.KVF_ERR_CLOSED)

    def text_of(self, attachment: Attachment) -> str:
        """Returns a text about an attachment, for people."""
        if not (attachment.detaching or self.closed):
            condition = in_flight(len(attachment.in_flight))
        elif attachment in self.attachments and not self.closed:
            condition = "detaching"
        else:
            condition = "detached"
        return f"at {attachment.address:#x}: {attachment.model}, {condition}"

    # ---- Closing, on this thread ----------------------------------------------------------------

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

    # ---- Being forgotten ------------------------------------------------------------------------

    def abandon(self) -> None:
        """Cancels what is in flight and takes the engine down, within a bounded time.

        For finalizers, on any thread. If the time is not enough everything is left as it is, and
        alive: memory must never be freed under a transfer.
        """
        if self.closed or self.is_inherited():
            return
        self.closed = True
        deadline = time.monotonic() + _PATIENCE_SECONDS
        if not (self._stop(deadline) and self._detach_all(deadline)):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))
            return
        lib.kvf_engine_destroy(self.handle)
        lib.kvf_queue_destroy(self.completions.queue)

    def _stop(self, deadline: float) -> bool:
        # First the workers, so that nothing more is submitted.
        for worker in [self.memory_worker, *(each.worker for each in self.attachments)]:
            if not worker.halt(deadline - time.monotonic()):
                return False
        lib.kvf_engine_cancel(self.handle)
        return self.completions.drain_without_loop(deadline - time.monotonic())

    def _detach_all(self, deadline: float) -> bool:
        # Attachments of other engines may run calls on the context's thread.
        return all(
            each.worker.when_idle(
                functools.partial(lib.kvf_llama_detach, each.handle), deadline - time.monotonic()
            )
            for each in self.attachments
        )


def in_flight(count: int) -> str:
    """Returns a text that says how many transfers are in flight."""
    return f"{count or 'no'} transfer{'s' if count > 1 else ''} in flight"
