"""An event loop on a thread of its own, for code that has none."""

from __future__ import annotations

import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from typing import Generic, TypeVar

import anyio
from anyio.from_thread import BlockingPortal

T = TypeVar("T")
R = TypeVar("R")


class LoopThread(Generic[T]):
    """Enters an asynchronous context on a new thread, and runs functions there until ``close``.

    (anyio's ``start_blocking_portal`` is a generator: a forked child that collects it would wait
    for the thread, which the child does not have.)
    """

    def __init__(self, name: str, opened: Callable[[], AbstractAsyncContextManager[T]]) -> None:
        """Raises what ``opened`` or entering the context raises."""
        self._process = os.getpid()
        self._opened = opened
        self._ready: Future[tuple[BlockingPortal, T]] = Future()
        self._over: Future[None] = Future()
        # A daemon: the exit of the program does not wait for it.
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()
        try:
            self._portal, self.context = self._ready.result()
        except Exception:
            self._thread.join()
            raise

    @property
    def is_here(self) -> bool:
        """Whether this process has the thread. A forked child does not have it."""
        return os.getpid() == self._process

    def call(self, function: Callable[[], Awaitable[R]]) -> R:
        """Runs a function, and returns when it has ended, also if a signal handler raises: then the
        function is cancelled first."""
        ended = threading.Event()

        async def run() -> R:
            try:
                return await function()
            finally:
                ended.set()

        future = self._portal.start_task_soon(run)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            ended.wait()
            raise

    def close(self) -> None:
        """Leaves the context, and ends the thread. Raises what leaving raises."""
        self._portal.call(self._portal.stop)
        self._over.result()
        self._thread.join()

    def _serve(self) -> None:
        try:
            anyio.run(self._main)
        except BaseException as failure:
            (self._over if self._ready.done() else self._ready).set_exception(failure)
        else:
            self._over.set_result(None)

    async def _main(self) -> None:
        # The context is entered first: the portal would raise an exception of that in a group.
        async with self._opened() as context, BlockingPortal() as portal:
            self._ready.set_result((portal, context))
            await portal.sleep_until_stopped()
