"""A thread that makes calls one after another, for tasks that await their results.

Only one thread at a time may use a llama context. kvferry gives each context a thread of its own,
which all attachments to that context share, those of other engines too. Decoding and recording take
turns there: urgent calls first, others in the order in which they were asked for. The event loop
stays free.

The thread of a context is always the same one, rather than any thread of a pool: libraries keep
state for each thread (CUDA's current device, thread pools, error records), and the waiting calls
are then one queue, which can be searched, cut short, and ended with a detach.

Results come back through the completion queue's descriptor (completions.py), as completions do.

Asking for a call and cancelling a call take no lock: a signal handler that raises in between would
leave the lock taken. Both sides use single operations of deques and dicts instead.
"""

from __future__ import annotations

import contextvars
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, TypeVar, cast

from .._native import lib
from ..errors import error
from .cancellation import await_to_end
from .completions import Completions, PendingCall

T = TypeVar("T")


class Call(PendingCall):
    """A call on a worker's thread. Once it has ended, it has a ``result`` or a ``failure``."""

    result: Any = None
    failure: BaseException | None = None

    def __init__(
        self,
        worker: Worker,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        after: Callable[[Call], None] | None,
    ) -> None:
        super().__init__()
        self.worker = worker
        self.begun = False
        self.running = False
        self.caller = _call_around()
        """The call of any worker that asked for this one, if that call still runs."""
        self._function: Callable[..., Any] | None = function
        self._arguments = arguments
        self._after = after
        self._context: contextvars.Context | None = contextvars.copy_context()
        # Decides whether the call is made: the first entry under "by" counts.
        self._decided: dict[str, str] = {}

    def run(self) -> bool:
        """Makes the call. Returns False if it has been cancelled, or made, before.

        For the worker's thread.
        """
        if self.begun or self._decided.setdefault("by", "the thread") != "the thread":
            return False
        self.begun = True
        assert self._context is not None
        self.running = True
        try:
            self.result = self._context.run(self._run_inside)
        except BaseException as failure:
            self.failure = failure
        self.running = False
        return True

    def _run_inside(self) -> Any:
        assert self._function is not None
        _running_call.set(self)
        return self._function(*self._arguments)

    def cancel(self) -> bool:
        """Ends the call unless the thread has begun it. Returns whether it did. May be repeated.

        For the event loop's thread.
        """
        if not self.discard():
            return False
        self.failure = error(lib.KVF_ERR_CANCELLED)
        self.over()
        self.worker.completions.end(self)
        return True

    def discard(self) -> bool:
        """Keeps the thread from beginning the call, and wakes no task.

        Returns False if the call has begun.
        """
        return self._decided.setdefault("by", "the caller") == "the caller"

    def over(self) -> None:
        # The thread may hold this object a little longer: then it must not keep memory alive.
        self._function, self._arguments, self._context = None, (), None
        if self._after is not None:
            self._after(self)
            self._after = None


_running_call: contextvars.ContextVar[Call | None] = contextvars.ContextVar(
    "kvferry_running_call", default=None
)
"""The call that this code is part of, also in tasks that it has started on an event loop."""


def _call_around() -> Call | None:
    call = _running_call.get()
    while call is not None and not call.running:
        call = call.caller
    return call


class WorkerThread:
    """The thread of one or several workers. The first call starts it."""

    def __init__(self, name: str, address: int | None = None) -> None:
        self.lock = threading.RLock()
        """Held while a call runs."""
        self.ident: int | None = None
        # Those that are not stopped. A worker whose attachment could not be made is collected.
        self.workers: weakref.WeakSet[Worker] = weakref.WeakSet()
        self._name = name
        self._address = address
        self._calls: deque[Call] = deque()
        self._first_calls: deque[Call] = deque()  # made before all others
        self._changes: SimpleQueue[None] = SimpleQueue()
        self._started = False
        self._serving = threading.Lock()

    def post(self, call: Call, first: bool) -> None:
        (self._first_calls if first else self._calls).append(call)
        if not self._started:
            # A daemon, so that the interpreter's exit does not wait for it. If an exception
            # interrupts this, another thread may be started, which finds nothing to do.
            threading.Thread(target=self._serve, name=self._name, daemon=True).start()
            self._started = True
        self.notify()

    def notify(self) -> None:
        """Wakes the thread, to look at its calls and its workers."""
        self._changes.put(None)

    def leave(self, worker: Worker) -> None:
        """Removes a worker. Without workers the thread ends, after the calls that it has."""
        with _contexts_lock:
            self.workers.discard(worker)
        self.notify()
        if not self._started:
            self._is_over()

    def discard_calls(self, worker: Worker) -> None:
        for call in [*self._first_calls.copy(), *self._calls.copy()]:
            if call.worker is worker:
                call.discard()

    def _serve(self) -> None:
        if not self._serving.acquire(blocking=False):
            return
        self.ident = threading.get_ident()
        while not self._is_over():
            self._changes.get()
            while call := self._next():
                with self.lock:
                    has_run = call.run()
                if has_run:
                    call.worker.completions.post(call)
                del call  # otherwise the call would live until the next one

    def _next(self) -> Call | None:
        for calls in (self._first_calls, self._calls):
            if calls:
                return calls.popleft()
        return None

    def _is_over(self) -> bool:
        with _contexts_lock:
            if self.workers or self._first_calls or self._calls:
                return False
            if self._address is not None and _contexts.get(self._address) is self:
                del _contexts[self._address]
            return True


class Worker:
    """The calls that one engine, or one of its attachments, makes on a thread."""

    def __init__(self, completions: Completions, thread: WorkerThread) -> None:
        self.completions = completions
        self.stopped = False
        self._thread = thread
        thread.workers.add(self)

    async def call(self, function: Callable[..., T], *arguments: Any, first: bool = False) -> T:
        """Makes a call; returns its result or raises its exception. Cancelling: see ``outcome``."""
        self.check_awaitable()
        call = self.make(function, *arguments)
        try:
            self.ask_for(call, first=first)
            return cast(T, await self.outcome(call))
        except BaseException:
            if not call.ended:
                call.cancel()  # a signal handler has raised before the waiting began
            raise

    async def outcome(self, call: Call) -> Any:
        """Waits for a call that was asked for; returns its result or raises its exception.

        If the waiting task is cancelled, the call is cancelled too if the thread has not begun it.
        Else the task waits for the end of the call, and then the cancellation goes on.
        """

        async def until_ended() -> None:
            await self.completions.until_ended(call)

        def cancel() -> None:
            call.cancel()

        await await_to_end(until_ended, cancel)
        # Taken out of the call, which the thread may hold a little longer. No variable keeps the
        # exception when it is raised: its traceback would refer to this frame, the frame to it.
        result, call.result = call.result, None
        failure, call.failure = call.failure, None
        if failure is not None:
            try:
                raise failure
            finally:
                del failure
        return result

    def check_awaitable(self) -> None:
        """Raises RuntimeError where waiting for this thread would never end, or cannot be done.

        Code that runs on the thread, and tasks that such code starts on an event loop, would wait
        for themselves. Raises Forked in a forked child.
        """
        self.completions.check_waitable()
        self._check_outside()

    def check_elsewhere(self) -> None:
        """Raises RuntimeError on this very thread, and where ``check_awaitable`` does."""
        if threading.get_ident() == self._thread.ident:
            raise RuntimeError("called on the context's thread, which would wait for itself")
        self._check_outside()

    def _check_outside(self) -> None:
        call = _call_around()
        while call is not None:
            if call.running and call.worker._thread is self._thread:
                raise RuntimeError(
                    "called from inside of what Llama.run() runs: the context's thread would wait "
                    "for itself; Llama.sync is for code that runs there"
                )
            call = call.caller

    def make(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        after: Callable[[Call], None] | None = None,
    ) -> Call:
        """Returns a call that is not asked for yet.

        ``after`` is called with the call, on the event loop's thread, when the call has ended in
        any way; and again if an exception interrupts ``after``.
        """
        return Call(self, function, arguments, after)

    def ask_for(self, call: Call, *, first: bool = False) -> None:
        """Asks for a call; ``first`` puts it before all calls that have not begun.

        If an exception interrupts this, the call may have been asked for or not. Raises Forked,
        EngineClosed.
        """
        self.completions.check_process()
        if self.stopped:
            raise error(lib.KVF_ERR_CLOSED)
        self._thread.post(call, first)

    def ask_for_last(self, call: Call) -> None:
        """Asks for a call, and refuses all further calls. May be repeated."""
        if not self.stopped:
            self.ask_for(call)
        self.stop()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keeps the thread from making calls in the ``with`` block. Blocks until its current call
        has ended. A call on that thread may use it too."""
        self.completions.check_process()
        if threading.get_ident() != self._thread.ident:
            self._check_outside()
        with self._thread.lock:
            yield

    def stop(self) -> None:
        """Refuses further calls. Calls that were asked for before are still made."""
        self.stopped = True
        self._thread.leave(self)

    def halt(self, seconds: float) -> bool:
        """Stops, discards the calls that have not begun, and waits for the one that has.

        Blocks, and wakes no task: for finalizers. Returns False if the call has not ended after
        ``seconds``.
        """
        self.stop()
        self._thread.discard_calls(self)
        # The thread decides under the lock whether it makes a call. (A garbage collection during a
        # call runs this on that very thread, which has the lock.)
        return self.when_idle(lambda: None, seconds)

    def when_idle(self, function: Callable[[], object], seconds: float) -> bool:
        """Calls ``function`` on this thread while the worker's thread makes no call.

        Blocks: for finalizers. Returns False if the current call has not ended after ``seconds``.
        """
        timeout = -1 if seconds == math.inf else max(0.0, seconds)
        if not self._thread.lock.acquire(timeout=timeout):
            return False
        try:
            function()
        finally:
            self._thread.lock.release()
        return True


# The thread of each context that has attachments, by the context's address.
_contexts: dict[int, WorkerThread] = {}
# Reentrant: the garbage collector may take down a forgotten engine in the middle of a call.
_contexts_lock = threading.RLock()


def context_worker(address: int, completions: Completions) -> Worker:
    """Returns a worker on the thread of the llama context at this address. Stop it in the end."""
    with _contexts_lock:
        thread = _contexts.get(address)
        if thread is None:
            thread = _contexts[address] = WorkerThread("kvferry context", address)
        return Worker(completions, thread)


def _start_anew() -> None:
    global _contexts_lock
    _contexts.clear()
    _contexts_lock = threading.RLock()


# A forked child has none of these threads.
os.register_at_fork(after_in_child=_start_anew)
