"""The one bridge between the C library's completion queue and the event loop.

Completions arrive on C threads, in a queue with a pollable file descriptor. Python looks at that
descriptor with ``anyio.wait_readable``, which asyncio, uvloop and trio all have: no C thread ever
calls into the interpreter, and no thread waits for a transfer. The context's worker thread (see
worker.py) reports through the same descriptor.

There is no background task. Of the tasks that wait, one is the *reader*: it waits for the
descriptor, takes what has arrived, and wakes whom it concerns. The others are *followers*: each
sleeps on an event of its own. A reader that leaves, be it served, cancelled or failed, hands the
role to a follower before it goes, so that while anybody waits somebody reads. The role always has
an owner who is running or about to run.

Between any two steps of the main thread a signal handler may raise: trio's on Ctrl-C, asyncio's on
the second one, the program's own. Nothing may be lost by that, so everything here can be done
again: what has been taken is forgotten only after all that follows from it, and whatever must be
undone is undone in a ``finally`` that does it twice. (In CPython no handler runs between a ``try``
or ``finally`` and the first call in it.)
"""

from __future__ import annotations

import itertools
import os
import time
import weakref
from collections import deque
from typing import Any

import anyio
import anyio.lowlevel

from .._native import ffi, lib
from ..errors import check, error
from .completion import Completion, completion_of

# Completions taken before other tasks get their turn again: about half a millisecond of work.
_BATCH = 64


class Pending:
    """Something that ends exactly once, and that tasks can wait for."""

    def __init__(self) -> None:
        self.ended = False
        self.turns: list[anyio.Event] = []  # of the tasks that wait for it


class PendingTransfer(Pending):
    """A job of the C library, as the bridge sees it. Its methods may be called again."""

    token: int
    """The job's ``user_data``."""

    @property
    def job(self) -> int | None:
        """The job's handle; None if no job has been submitted, or not yet."""
        raise NotImplementedError

    def cancel(self) -> None:
        raise NotImplementedError

    def completed(self, completion: Completion) -> None:
        raise NotImplementedError

    def withdrawn(self) -> None:
        raise NotImplementedError


class PendingCall(Pending):
    """A call on a worker thread, as the bridge sees it. Its method may be called again."""

    def returned(self) -> None:
        raise NotImplementedError


class Completions:
    """The completion queue of one engine, and everything in flight that ends through it.

    Every method belongs to the thread of the event loop, but for ``post``.
    """

    def __init__(self) -> None:
        """Call ``open`` next, and ``destroy`` in the end, whether or not that has succeeded."""
        self._queue = ffi.new("kvf_queue *")
        self._fd = -1
        self.closing = False
        # Set by the engine. Whoever waits keeps the engine alive, not only the transfer waited for.
        self.owner: weakref.ref[object] | None = None
        self._process = os.getpid()
        self._records = ffi.new("kvf_completion[]", _BATCH)
        self._tokens = itertools.count(1)
        self._transfers: dict[int, PendingTransfer] = {}
        self._seen = 0  # of the records that were taken
        self._posted: deque[PendingCall] = deque()
        self._woken = False  # for what has been posted
        self._draining = False  # true between drains only where an exception broke one off
        self._reader: anyio.Event | None = None
        self._followers: dict[anyio.Event, None] = {}  # in order of arrival
        self._loop: object = None

    def open(self) -> None:
        check(lib.kvf_queue_create(self._queue))
        self._fd = check(lib.kvf_queue_fd(self.queue))

    @property
    def queue(self) -> int:
        """Its handle; 0 before it has been opened."""
        handle: int = self._queue[0]
        return handle

    # ---- What is in flight ---------------------------------------------------------------------

    def new_token(self) -> int:
        return next(self._tokens)

    def expect(self, transfer: PendingTransfer) -> None:
        """Notes a transfer that is about to be submitted.

        Noting it first is what makes it safe to submit from another thread: the completion may be
        here before the submitting call has returned.
        """
        self.check_usable()
        self._transfers[transfer.token] = transfer

    def pick_up(self) -> None:
        """Ends what has ended and nobody has waited for, so that forgotten buffers come free."""
        if self._transfers and self._reader is None:
            self._drain()

    def withdraw(self, transfer: PendingTransfer) -> None:
        """Ends a transfer of which no job was made."""
        transfer.withdrawn()
        self.end(transfer)
        # It may be the reader's own, who would wait for a descriptor that stays silent.
        lib.kvf_queue_wake(self.queue)
        self._transfers.pop(transfer.token, None)

    def transfers(self) -> list[PendingTransfer]:
        return list(self._transfers.values())

    def post(self, call: PendingCall) -> None:
        """Reports the end of a worker's call. For the worker's thread."""
        self._posted.append(call)
        self._wake()

    def _wake(self) -> None:
        """Makes the descriptor readable, once for all that is posted until it is looked at."""
        if not self._woken:
            self._woken = True
            lib.kvf_queue_wake(self.queue)

    def check_process(self) -> None:
        """Refuses to work in a forked child: it has none of the threads, and shares the queue."""
        if os.getpid() != self._process:
            raise error(lib.KVF_ERR_FORKED)

    def check_usable(self) -> None:
        self.check_process()
        if self.closing:
            raise error(lib.KVF_ERR_CLOSED)

    # ---- Waiting -------------------------------------------------------------------------------

    def check_waitable(self) -> None:
        """Raises where this task can't wait: in a forked child, or beside another event loop."""
        self.check_process()
        loop = anyio.lowlevel.current_token()
        if self._reader is not None and loop != self._loop:
            if not _is_over(self._loop):
                raise RuntimeError("an Engine can be used from one event loop at a time")
            self._forget_waiters()

    async def until_ended(self, pending: Pending) -> None:
        """Waits until it has ended. May be cancelled, which leaves it in flight."""
        if pending.ended:
            await anyio.lowlevel.checkpoint()
            return
        self.check_waitable()
        owner = self.owner() if self.owner else None
        turn = anyio.Event()  # set when `pending` has ended, or when it is our turn to read
        try:
            if self._reader is None:
                self._loop = anyio.lowlevel.current_token()
                self._reader = turn
            else:
                self._followers[turn] = None
                pending.turns.append(turn)
                await turn.wait()
            while not pending.ended:
                if not self._draining:
                    await anyio.wait_readable(self._fd)
                self._drain()
        except GeneratorExit:
            if _is_over(self._loop):
                self._forget_waiters()  # nobody can be woken any more
            raise
        finally:
            try:
                self._leave(turn)
            finally:
                self._leave(turn)
            del owner

    def _leave(self, turn: anyio.Event) -> None:
        self._followers.pop(turn, None)
        if self._reader is not turn:
            return
        successor = next(iter(self._followers), None)
        if successor is not None:
            successor.set()
        # First it has the role, then it is no follower any more: never neither.
        self._reader = successor
        if successor is not None:
            self._followers.pop(successor, None)

    def _forget_waiters(self) -> None:
        """Of a loop that was closed under them: none of them runs again."""
        self._followers.clear()
        self._reader = None

    # ---- Reading -------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Takes what has arrived, a batch of each kind; the descriptor stays readable for the rest.

        Only the reader may call this while there is one: else its own transfer could end without
        the descriptor telling it. If an exception breaks it off the next drain goes on with it.
        """
        self._draining = True
        self._take(0)
        self._take_posted()
        self._draining = False

    def _take(self, timeout_ns: int) -> None:
        self._see_records()  # of a call that was broken off
        check(
            lib.kvf_queue_take(
                self.queue, self._records, ffi.sizeof("kvf_completion"), _BATCH, timeout_ns
            )
        )
        self._see_records()

    def _see_records(self) -> None:
        """Ends the transfers whose records are there: those with a token, which is never 0."""
        while self._seen < _BATCH and (token := self._records[self._seen].user_data):
            record = self._records[self._seen]
            transfer = self._transfers.get(token)
            if transfer is not None:
                transfer.completed(completion_of(record))
                self.end(transfer)
                self._transfers.pop(token, None)
            self._seen += 1
            record.user_data = 0
        self._seen = 0

    def _take_posted(self) -> None:
        self._woken = False
        for _ in range(min(len(self._posted), _BATCH)):
            call = self._posted[0]
            call.returned()
            self.end(call)
            self._posted.popleft()
        if self._posted:
            self._wake()

    def end(self, pending: Pending) -> None:
        """Marks it as ended and wakes the tasks that wait for it."""
        pending.ended = True
        for turn in pending.turns:
            # A follower that has been made the reader has left the list, and has its event set.
            if turn in self._followers:
                turn.set()
                self._followers.pop(turn, None)
        pending.turns.clear()

    # ---- The end -------------------------------------------------------------------------------

    def drain_without_loop(self, seconds: float) -> bool:
        """Takes every completion, blocking at most so long; True if nothing is left in flight.

        For finalizers: the event loop is gone or not ours, so nobody is woken. Worker threads must
        have stopped.
        """
        self.closing = True
        self._followers.clear()
        while self._posted:
            self._take_posted()
        for transfer in self.transfers():
            if transfer.job is None:
                self.withdraw(transfer)
        deadline = time.monotonic() + seconds
        while self._transfers:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return False
            self._take(int(remaining * 1e9))
        return True

    def destroy(self) -> None:
        """Destroys the queue; may be called again."""
        status = lib.kvf_queue_destroy(self.queue)
        if status != lib.KVF_ERR_INVALID_HANDLE:
            check(status)


def _is_over(loop: object) -> bool:
    """Whether an event loop, given by its token, will run no task any more."""
    native: Any = getattr(loop, "native_token", loop)  # anyio before 4.11 has no token of its own
    if hasattr(native, "is_closed"):
        return bool(native.is_closed())
    try:
        native.run_sync_soon(_nothing, idempotent=True)
    except RuntimeError:  # trio.RunFinishedError
        return True
    return False


def _nothing() -> None:
    pass
