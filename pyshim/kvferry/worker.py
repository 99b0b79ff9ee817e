"""A thread that makes calls one after the other, for tasks that await their results.

A llama context belongs to one thread at a time. kvferry gives each attachment a thread of its own:
decoding and capturing take turns there, in the order in which they were asked for, and the event
loop stays free. A thread that is always the same one, rather than any of a pool that take turns,
because libraries keep state per thread (CUDA's current device, thread pools, errno-like records),
and because its backlog is then a queue that can be looked at, cut short, and ended with a detach.

Results come back through the completion queue's descriptor (completions.py), as transfers' do.
"""

from __future__ import annotations

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from ._native import lib
from .completions import Completions, PendingCall, see_through
from .errors import error

T = TypeVar("T")


class Call(PendingCall):
    """A call that was asked for. Either ``result`` or ``failure`` counts once it has ended."""

    result: Any = None
    failure: BaseException | None = None

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        after: Callable[[Call], None] | None,
    ) -> None:
        super().__init__()
        self._function: Callable[..., Any] | None = function
        self._arguments = arguments
        self._after = after
        self._context = contextvars.copy_context()

    def run(self) -> None:
        assert self._function is not None
        try:
            self.result = self._context.run(self._function, *self._arguments)
        except BaseException as failure:
            self.failure = failure

    def returned(self) -> None:
        # The thread may hold this object a little longer: it must not keep anybody's memory.
        self._function, self._arguments = None, ()
        after, self._after = self._after, None
        if after is not None:
            after(self)


class Worker:
    """The thread, started by the first call. ``lock`` is held while a call runs."""

    def __init__(self, name: str, completions: Completions) -> None:
        self._name = name
        self._completions = completions
        self._calls: deque[Call] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._at_work = False
        self.stopped = False
        self.lock = threading.RLock()

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Makes the call, and returns or raises as it does. Cancelling: see ``outcome``."""
        return cast(T, await self.outcome(self.post(function, *arguments)))

    async def outcome(self, call: Call) -> Any:
        """Waits for a call that was asked for; returns or raises as it does.

        A cancelled task takes its call back if the thread hasn't begun with it; else it waits for
        the end, and the cancellation goes on after that.
        """

        async def until_ended() -> None:
            await self._completions.until_ended(call)

        def take_back() -> None:
            self._take_back(call)

        await see_through(until_ended, take_back)
        # Taken out of the call, which the thread may hold a little longer, and not kept in a
        # variable when raised: the traceback would refer to this frame, and the frame to it.
        result, call.result = call.result, None
        failure, call.failure = call.failure, None
        if failure is not None:
            try:
                raise failure
            finally:
                del failure
        return result

    def post(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        first: bool = False,
        after: Callable[[Call], None] | None = None,
    ) -> Call:
        """Asks for a call and returns at once. ``first`` puts it before all that haven't begun.

        ``after`` is called with it on the event loop's thread once it has ended, in whatever way.
        """
        self._completions.check_process()
        call = Call(function, arguments, after)
        with self._changed:
            if self.stopped:
                raise error(lib.KVF_ERR_CLOSED)
            if first:
                self._calls.appendleft(call)
            else:
                self._calls.append(call)
            if self._thread is None:
                # A daemon: the interpreter's exit doesn't wait for a queue that nobody fills.
                self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify()
        return call

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Holds off the worker's calls, after the one that runs. Blocks; a call may nest it."""
        self._completions.check_process()
        with self.lock:
            yield

    def stop(self) -> None:
        """Refuses further calls; the thread ends after those that it has."""
        with self._changed:
            self.stopped = True
            self._changed.notify()

    def halt(self, seconds: float) -> bool:
        """Stops, forgets the calls that haven't begun, and waits for the one that has.

        For finalizers: blocks, no task learns of it. False if it didn't end within that time.
        """
        with self._changed:
            self.stopped = True
            self._calls.clear()
            self._changed.notify()
            if threading.current_thread() is self._thread:
                return True  # collected during a call
            return self._changed.wait_for(lambda: not self._at_work, max(0.0, seconds))

    def _take_back(self, call: Call) -> None:
        with self._changed:
            if call not in self._calls:
                return
            self._calls.remove(call)
        call.failure = error(lib.KVF_ERR_CANCELLED)
        call.ended = True
        call.returned()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._at_work = False
                if self.stopped:
                    self._changed.notify_all()
                while not self._calls:
                    if self.stopped:
                        return
                    self._changed.wait()
                call = self._calls.popleft()
                self._at_work = True
            with self.lock:
                call.run()
            self._completions.post(call)
            del call  # else it would live until the next one comes
