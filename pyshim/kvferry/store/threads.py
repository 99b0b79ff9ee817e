"""Threads that call the disk, and tasks that never wait for them without end.

A thread that the kernel holds in a system call cannot be stopped. So a task that waits for a call
gives up when the call has made no progress for some time. The call itself goes on, and the memory
that its thread uses is released when the call has ended.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import anyio
import anyio.abc
import anyio.to_thread

from .._native import lib
from ..errors import error
from .system import System

T = TypeVar("T")

_CHECKS = 8
"""How often a waiting task checks for progress before it gives up."""


class Hanging(TimeoutError):
    """A call to the disk makes no progress."""


class Progress(System):
    """Notes for each call of DiskThreads when its latest system call has ended."""

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def run(self, call: Call[Any]) -> None:
        """Runs a call on this thread."""
        self._of_thread.call = call
        try:
            call.run()
        finally:
            self._of_thread.call = None

    def call_once(self, function: Callable[..., T], *arguments: object) -> T:
        try:
            return super().call_once(function, *arguments)
        finally:
            call = getattr(self._of_thread, "call", None)
            if call is not None:
                call.latest = time.monotonic()


class Call(Generic[T]):
    """A call on a thread, and its outcome."""

    def __init__(self, function: Callable[[], T], dropped: Callable[[], None]) -> None:
        self._function = function
        self._result: T | None = None
        self._problem: BaseException | None = error(lib.KVF_ERR_CLOSED, "the store")
        self._dropped = dropped
        self.wanted = True
        self.begun = self.running = False
        self.latest = 0.0
        """When the call began, or its latest system call ended, by ``time.monotonic``."""
        self.ended = anyio.Event()

    def run(self) -> None:
        """For the thread."""
        self.latest = time.monotonic()
        self.begun = self.running = True
        try:
            self._result, self._problem = self._function(), None
        except Exception as problem:
            self._problem = problem
        finally:
            # The thread may hold this object longer than the task waits: the function must not
            # keep the memory that it has filled.
            del self._function
            self.running = False

    def stalls(self, patience: float) -> bool:
        """Whether the thread has made no progress for so many seconds."""
        return self.running and time.monotonic() - self.latest > patience

    def end(self) -> None:
        """The thread has ended, or there was none."""
        self.ended.set()
        if not self.wanted:
            self._dropped()

    def give_up(self) -> None:
        """Nobody waits for the call any more."""
        self.wanted = False
        if self.ended.is_set():
            self._dropped()

    def outcome(self) -> T:
        """Returns or raises what the function has returned or raised."""
        # No variable keeps the exception: its traceback refers to frames that have memory.
        problem, self._problem = self._problem, None
        if problem is not None:
            try:
                raise problem
            finally:
                del problem
        return cast("T", self._result)


class DiskThreads:
    """Threads that call the disk. All methods are for the thread of the event loop."""

    def __init__(self, count: int, patience: float, progress: Progress) -> None:
        """``patience`` is how many seconds a task waits for a call that makes no progress."""
        self._count = count
        self._patience = patience
        self._progress = progress
        self._limiter = anyio.CapacityLimiter(count)
        self._calls: set[Call[Any]] = set()  # that have not ended
        self._closed = False

    def open(self, tasks: anyio.abc.TaskGroup) -> None:
        """``tasks`` runs the tasks that wait for the threads."""
        self._tasks = tasks

    @property
    def stuck(self) -> bool:
        """Whether no thread makes progress."""
        return sum(call.stalls(self._patience) for call in self._calls) >= self._count

    async def call(
        self,
        function: Callable[..., T],
        *arguments: object,
        dropped: Callable[[], None] = lambda: None,
    ) -> T:
        """Returns or raises what the function returns or raises on a thread.

        Raises Hanging if the call makes no progress, and KvferryError after ``close``. If this
        raises anything, ``dropped`` is called when the thread has ended.
        """
        call = Call(functools.partial(function, *arguments), dropped)
        try:
            if self._closed:
                call.end()
                return call.outcome()
            if self.stuck:
                call.end()
                raise Hanging("the disk does not answer")
            self._tasks.start_soon(self._run, call)
            if not await self._ends(call):
                raise Hanging("the disk does not answer")
            return call.outcome()
        except BaseException:
            call.give_up()
            raise

    async def to_its_end(self, function: Callable[..., T], *arguments: object) -> T:
        """As ``call``, but waits as long as the call takes."""
        call = Call(functools.partial(function, *arguments), lambda: None)
        await self._run(call)
        return call.outcome()

    async def wait(self, event: anyio.Event) -> bool:
        """Waits for an event that the end of a call sets. Returns False if the threads are
        stuck."""
        return await self._wait(event, lambda: self.stuck)

    async def close(self) -> bool:
        """Begins no more calls, and waits for those that make progress. Returns False if a call
        hangs, which goes on on its thread."""
        self._closed = True
        return all([await self._ends(call) for call in list(self._calls)])

    async def _ends(self, call: Call[Any]) -> bool:
        """Waits for a call. Returns False if it makes no progress."""

        def stalls() -> bool:
            return call.stalls(self._patience) if call.begun else self.stuck

        return await self._wait(call.ended, stalls)

    async def _wait(self, event: anyio.Event, stalls: Callable[[], bool]) -> bool:
        while not event.is_set():
            if stalls():
                return False
            with anyio.move_on_after(self._patience / _CHECKS):
                await event.wait()
        return True

    async def _run(self, call: Call[Any]) -> None:
        # The task is cancelled only when the store is closed while the thread hangs.
        self._calls.add(call)
        try:
            await anyio.to_thread.run_sync(
                self._on_thread, call, abandon_on_cancel=True, limiter=self._limiter
            )
        finally:
            self._calls.discard(call)
            call.end()

    def _on_thread(self, call: Call[Any]) -> None:
        if call.wanted and not self._closed:
            self._progress.run(call)
