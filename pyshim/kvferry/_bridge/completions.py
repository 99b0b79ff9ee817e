"""The one bridge between the C library's completion queue and the event loop.

C threads put completions into a queue that has a pollable file descriptor. Python waits for that
descriptor with ``anyio.wait_readable``, which works on asyncio, uvloop and trio: no C thread ever
calls into the interpreter, and no thread waits for a transfer. The worker threads (worker.py)
report through the same descriptor.

There is no background task. Of the tasks that wait, one is the *reader*: it waits for the
descriptor, takes the completions, and wakes the tasks that wait for them. The others are
*followers*: each sleeps on an event of its own. A reader that stops waiting, whether it is served,
cancelled or failed, first hands its role to a follower. So there is a reader as long as any task
waits, and the reader is a task that runs or is about to run.

A signal handler may raise between any two steps of the main thread: trio's on Ctrl-C, asyncio's on
the second Ctrl-C, or the program's own. Nothing may be lost then, so every step here can be
repeated: a record is forgotten only after everything that follows from it has been done, and
clean-up stands in a ``try`` and again in its ``finally``. (In CPython no handler runs between a
``try`` or ``finally`` and the first call in it.)
"""

from __future__ import annotations

import itertools
import os
import time
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import anyio
import anyio.lowlevel

from .._native import ffi, lib
from ..errors import check, error
from .completion_record import Completion, completion_of

# How many completions are taken before other tasks run again: about half a millisecond of work.
_BATCH = 64


class Pending:
    """Something that ends exactly once, and that tasks can wait for."""

    def __init__(self) -> None:
        self.ended = False
        self.turns: list[anyio.Event] = []  # one event for each task that waits for it


class PendingTransfer(Pending):
    """A job of the C library, as the bridge sees it. Its methods may be called repeatedly."""

    token: int
    """The job's ``user_data``."""
    parts: Sequence[Pending] = ()
    """The blocks of a save of blocks. Each ends with its own completion, or with the transfer."""

    @property
    def job(self) -> int | None:
        """The job's handle; None while no job has been submitted."""
        raise NotImplementedError

    def cancel(self) -> None:
        raise NotImplementedError

    def part_completed(self, index: int, completion: Completion) -> None:
        raise NotImplementedError

    def completed(self, completion: Completion) -> None:
        raise NotImplementedError

    def withdrawn(self) -> None:
        raise NotImplementedError


class PendingCall(Pending):
    """A call on a worker thread, as the bridge sees it. Its method may be called repeatedly."""

    def over(self) -> None:
        """The call has returned, or has been cancelled before it began."""
        raise NotImplementedError


class Completions:
    """The completion queue of one engine, and everything in flight that it will report.

    All methods are for the thread of the event loop, except ``post``.
    """

    def __init__(self) -> None:
        """Call ``open`` next, and ``destroy`` in the end, even if ``open`` has failed."""
        self._queue = ffi.new("kvf_queue *")
        self._fd = -1
        self.closing = False
        # Set by the engine. A task that waits for a transfer keeps the engine alive too.
        self.owner: weakref.ref[object] | None = None
        self._process = os.getpid()
        self._records = ffi.new("kvf_completion[]", _BATCH)
        self._tokens = itertools.count(1)
        self._transfers: dict[int, PendingTransfer] = {}
        self._handled = 0  # how many of the records taken have been handled
        self._posted: deque[PendingCall] = deque()
        self._woken = False  # whether the queue has been woken for posted calls
        self._draining = False  # True between drains only if an exception has interrupted one
        self._reader: anyio.Event | None = None
        self._followers: dict[anyio.Event, None] = {}  # in the order in which they began to wait
        self._loop: object = None

    def open(self) -> None:
        check(lib.kvf_queue_create(self._queue))
        self._fd = check(lib.kvf_queue_fd(self.queue))

    @property
    def queue(self) -> int:
        """The handle of the queue; 0 before ``open``."""
        handle: int = self._queue[0]
        return handle

    # ---- What is in flight ---------------------------------------------------------------------

    def new_token(self) -> int:
        return next(self._tokens)

    def register(self, transfer: PendingTransfer) -> None:
        """Enters a transfer before its submitting call.

        Another thread may make that call, and the completion may be here before the call returns.
        """
        self.check_usable()
        self._transfers[transfer.token] = transfer

    def take_unattended(self) -> None:
        """Takes completions while no task waits, so that the buffers of forgotten transfers are
        released."""
        if self._transfers and self._reader is None:
            self._drain()

    def withdraw(self, transfer: PendingTransfer) -> None:
        """Ends a transfer that has no job."""
        transfer.withdrawn()
        self._end_transfer(transfer)
        # The reader may be waiting for this very transfer: without this it would wait for ever.
        lib.kvf_queue_wake(self.queue)
        self._transfers.pop(transfer.token, None)

    def transfers(self) -> list[PendingTransfer]:
        return list(self._transfers.values())

    def post(self, call: PendingCall) -> None:
        """Reports that a worker's call has ended. For the worker's thread."""
        self._posted.append(call)
        self._wake()

    def _wake(self) -> None:
        """Makes the descriptor readable, once for all calls posted before the next drain."""
        if not self._woken:
            self._woken = True
            lib.kvf_queue_wake(self.queue)

    def check_process(self) -> None:
        """Raises Forked in a forked child: it has none of the threads, and shares the queue."""
        if os.getpid() != self._process:
            raise error(lib.KVF_ERR_FORKED)

    def check_usable(self) -> None:
        self.check_process()
        if self.closing:
            raise error(lib.KVF_ERR_CLOSED)

    # ---- Waiting -------------------------------------------------------------------------------

    def check_waitable(self) -> None:
        """Raises Forked in a forked child, RuntimeError while another event loop waits."""
        self.check_process()
        loop = anyio.lowlevel.current_token()
        if self._reader is not None and loop != self._loop:
            if not _has_ended(self._loop):
                raise RuntimeError("an Engine can be used from one event loop at a time")
            self._forget_waiters()

    async def until_ended(self, pending: Pending) -> None:
        """Waits until ``pending`` has ended. Cancelling the wait leaves it in flight."""
        if pending.ended:
            await anyio.lowlevel.checkpoint()
            return
        self.check_waitable()
        owner = self.owner() if self.owner else None
        turn = anyio.Event()  # set when `pending` has ended, or when this task becomes the reader
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
            if _has_ended(self._loop):
                self._forget_waiters()  # none of its tasks can be woken any more
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
        # In this order, so that the successor is never neither reader nor follower.
        self._reader = successor
        if successor is not None:
            self._followers.pop(successor, None)

    def _forget_waiters(self) -> None:
        """Forgets the tasks of an event loop that has been closed: they never run again."""
        self._followers.clear()
        self._reader = None

    # ---- Reading -------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Takes a batch of completions and a batch of calls that have returned.

        If there are more, the descriptor stays readable. While there is a reader, only the reader
        may call this: otherwise its own transfer could end and leave the descriptor unreadable. If
        an exception interrupts a drain, the next one continues it.
        """
        self._draining = True
        self._take(0)
        self._take_posted()
        self._draining = False

    def _take(self, timeout_ns: int) -> None:
        self._handle_records()  # those that an interrupted call has left
        check(
            lib.kvf_queue_take(
                self.queue, self._records, ffi.sizeof("kvf_completion"), _BATCH, timeout_ns
            )
        )
        self._handle_records()

    def _handle_records(self) -> None:
        """Ends the transfers, and the parts of transfers, of the records that were taken. A record
        whose token is 0 has been handled: no transfer has this token."""
        while self._handled < _BATCH and (token := self._records[self._handled].user_data):
            record = self._records[self._handled]
            transfer = self._transfers.get(token)
            if transfer is not None and record.kind == lib.KVF_COMPLETION_BLOCK:
                transfer.part_completed(record.block, completion_of(record))
                self.end(transfer.parts[record.block])
            elif transfer is not None:
                transfer.completed(completion_of(record))
                self._end_transfer(transfer)
                self._transfers.pop(token, None)
            self._handled += 1
            record.user_data = 0
        self._handled = 0

    def _take_posted(self) -> None:
        self._woken = False
        for _ in range(min(len(self._posted), _BATCH)):
            call = self._posted[0]
            call.over()
            self.end(call)
            self._posted.popleft()
        if self._posted:
            self._wake()

    def _end_transfer(self, transfer: PendingTransfer) -> None:
        self.end(transfer)
        for part in transfer.parts:
            self.end(part)

    def end(self, pending: Pending) -> None:
        """Marks ``pending`` as ended and wakes the tasks that wait for it."""
        pending.ended = True
        for turn in pending.turns:
            # A follower that has become the reader is not in the list, and its event is set.
            if turn in self._followers:
                turn.set()
                self._followers.pop(turn, None)
        pending.turns.clear()

    # ---- The end -------------------------------------------------------------------------------

    def drain_without_loop(self, seconds: float) -> bool:
        """Takes all completions; returns True if nothing is left in flight after ``seconds``.

        Blocks. For finalizers, which run without the event loop: no task is woken. Worker threads
        must have stopped.
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
        """Destroys the queue. May be called repeatedly."""
        status = lib.kvf_queue_destroy(self.queue)
        if status != lib.KVF_ERR_INVALID_HANDLE:
            check(status)


def _has_ended(loop: object) -> bool:
    """Whether the event loop with this token has ended."""
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
