"""A thread that makes calls one after the other, for tasks that await their results.

A llama context belongs to one thread at a time. kvferry gives each context a thread of its own,
which all attachments to it share, those of other engines too: decoding and capturing take turns
there, what is urgent first, else in the order in which they were asked for, and the event loop
stays free. A thread that is always the same one, rather than any of a pool that take turns, because
libraries keep state per thread (CUDA's current device, thread pools, errno-like records), and
because its backlog is then a queue that can be looked at, cut short, and ended with a detach.

Results come back through the completion queue's descriptor (completions.py), as transfers' do.

No lock is taken to ask for a call or to take one back: a signal handler that raises in between
would leave it taken. What both sides do are single operations of deques and dicts instead.
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
from .cancellation import see_through
from .completions import Completions, PendingCall

T = TypeVar("T")


class Call(PendingCall):
    """A call that was asked for. Either ``result`` or ``failure`` counts once it has ended."""

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
        """The call of some worker from inside of which this one was asked for, if it still runs."""
        self._function: Callable[..., Any] | None = function
        self._arguments = arguments
        self._after = after
        self._context: contextvars.Context | None = contextvars.copy_context()
        self._claimed: dict[str, str] = {}  # the first to put an entry here decides about the call

    def run(self) -> bool:
        """Makes the call, on the worker's thread; False if it was taken back, or made, before."""
        if self.begun or self._claimed.setdefault("by", "the thread") != "the thread":
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

    def take_back(self) -> bool:
        """Ends it unless the thread has begun with it. May be repeated. For the loop's thread."""
        if not self.give_up():
            return False
        self.failure = error(lib.KVF_ERR_CANCELLED)
        self.returned()
        self.worker.completions.end(self)
        return True

    def give_up(self) -> bool:
        """Keeps the thread from beginning with it, and tells nobody. False if it has begun."""
        return self._claimed.setdefault("by", "the caller") == "the caller"

    def returned(self) -> None:
        # The thread may hold this object a little longer: it must not keep anybody's memory.
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
    """The thread behind one worker, or several. It is started by the first call."""

    def __init__(self, name: str, address: int | None = None) -> None:
        self.lock = threading.RLock()
        """Held while a call runs."""
        self.ident: int | None = None
        # Those that aren't stopped. One that an exception kept from its attachment is forgotten.
        self.workers: weakref.WeakSet[Worker] = weakref.WeakSet()
        self._name = name
        self._address = address
        self._calls: deque[Call] = deque()
        self._first_calls: deque[Call] = deque()  # that go before all of these
        self._changes: SimpleQueue[None] = SimpleQueue()
        self._started = False
        self._serving = threading.Lock()

    def post(self, call: Call, first: bool) -> None:
        (self._first_calls if first else self._calls).append(call)
        if not self._started:
            # A daemon: the interpreter's exit doesn't wait for a queue that nobody fills. Where an
            # exception breaks this off another one may be started, which finds nothing to do.
            threading.Thread(target=self._serve, name=self._name, daemon=True).start()
            self._started = True
        self.notify()

    def notify(self) -> None:
        """Makes the thread look at its calls and workers."""
        self._changes.put(None)

    def leave(self, worker: Worker) -> None:
        """Without workers the thread ends after the calls that it has."""
        with _contexts_lock:
            self.workers.discard(worker)
        self.notify()
        if not self._started:
            self._is_over()

    def give_up_calls(self, worker: Worker) -> None:
        for call in [*self._first_calls.copy(), *self._calls.copy()]:
            if call.worker is worker:
                call.give_up()

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
                del call  # else it would live until the next one comes

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
    """What one engine, or one of its attachments, asks of a thread."""

    def __init__(self, completions: Completions, thread: WorkerThread) -> None:
        self.completions = completions
        self.stopped = False
        self._thread = thread
        thread.workers.add(self)

    async def call(self, function: Callable[..., T], *arguments: Any, first: bool = False) -> T:
        """Makes the call, and returns or raises as it does. Cancelling: see ``outcome``."""
        self.check_awaitable()
        call = self.make(function, *arguments)
        try:
            self.ask_for(call, first=first)
            return cast(T, await self.outcome(call))
        except BaseException:
            if not call.ended:
                call.take_back()  # a signal handler has raised before the waiting began
            raise

    async def outcome(self, call: Call) -> Any:
        """Waits for a call that was asked for; returns or raises as it does.

        A cancelled task takes its call back if the thread hasn't begun with it; else it waits for
        the end, and the cancellation goes on after that.
        """

        async def until_ended() -> None:
            await self.completions.until_ended(call)

        def take_back() -> None:
            call.take_back()

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

    def check_awaitable(self) -> None:
        """Raises where waiting for this thread would never end, or can't be done from here.

        Code that runs on the thread, and whatever that code starts on an event loop, would wait for
        itself.
        """
        self.completions.check_waitable()
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
        """A call that hasn't been asked for yet.

        ``after`` is called with it on the event loop's thread once it has ended, in whatever way;
        and again where an exception broke in.
        """
        return Call(self, function, arguments, after)

    def post(self, function: Callable[..., Any], *arguments: Any, first: bool = False) -> Call:
        """Asks for a call and returns at once. ``first`` puts it before all that haven't begun."""
        call = self.make(function, *arguments)
        self.ask_for(call, first=first)
        return call

    def ask_for(self, call: Call, *, first: bool = False) -> None:
        """Asks for a call. Where an exception breaks in, it may have been asked for or not."""
        self.completions.check_process()
        if self.stopped:
            raise error(lib.KVF_ERR_CLOSED)
        self._thread.post(call, first)

    def ask_for_last(self, call: Call) -> None:
        """Asks for a call, and refuses all others from then on. May be repeated."""
        if not self.stopped:
            self.ask_for(call)
        self.stop()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Holds off the thread's calls, after the one that runs. Blocks; a call may nest it."""
        self.completions.check_process()
        if threading.get_ident() != self._thread.ident:
            self._check_outside()
        with self._thread.lock:
            yield

    def stop(self) -> None:
        """Refuses further calls. Those asked for before are made."""
        self.stopped = True
        self._thread.leave(self)

    def halt(self, seconds: float) -> bool:
        """Stops, forgets the calls that haven't begun, and waits for the one that has.

        For finalizers: blocks, no task learns of it. False if it didn't end within that time.
        """
        self.stop()
        self._thread.give_up_calls(self)
        # The thread looks whether it may make a call with the lock taken. (Collected during a call
        # this is the thread itself, which has the lock.)
        return self.when_idle(lambda: None, seconds)

    def when_idle(self, function: Callable[[], object], seconds: float) -> bool:
        """Calls it here while the thread makes no call. False if that took longer to begin.

        For finalizers: blocks.
        """
        timeout = -1 if seconds == math.inf else max(0.0, seconds)
        if not self._thread.lock.acquire(timeout=timeout):
            return False
        try:
            function()
        finally:
            self._thread.lock.release()
        return True


# The threads of the contexts that are attached to, by the contexts' addresses.
_contexts: dict[int, WorkerThread] = {}
# Reentrant: a collection in the middle of a call may take down a forgotten engine.
_contexts_lock = threading.RLock()


def context_worker(address: int, completions: Completions) -> Worker:
    """A worker on the thread of the llama context at this address. To be stopped in the end."""
    with _contexts_lock:
        thread = _contexts.get(address)
        if thread is None:
            thread = _contexts[address] = WorkerThread("kvferry context", address)
        return Worker(completions, thread)


def _start_anew() -> None:
    global _contexts_lock
    _contexts.clear()
    _contexts_lock = threading.RLock()


# The child has none of these threads.
os.register_at_fork(after_in_child=_start_anew)
