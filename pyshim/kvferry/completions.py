"""The one bridge between the C library's completion queue and the event loop.

Completions arrive on C threads, in a queue with a pollable file descriptor. Python looks at that
descriptor with ``anyio.wait_readable``, which asyncio, uvloop and trio all have: no C thread ever
calls into the interpreter, and no thread waits for a transfer. The context's worker thread (see
worker.py) reports through the same descriptor.

There is no background task. Of the tasks that wait, one is the *reader*: it waits for the
descriptor, takes what has arrived, and wakes whom it concerns. The others are *followers*: each
sleeps on an event of its own. A reader that leaves, be it served, cancelled or failed, hands the
role to a follower before it goes, so that while anybody waits somebody reads. The role always has
an owner who is running or about to run; that is all there is to get right here.
"""

from __future__ import annotations

import itertools
import os
import time
import weakref
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, NamedTuple

import anyio
import anyio.lowlevel

from ._native import ffi, lib
from .errors import check, error

if TYPE_CHECKING:
    from ._native import CData

# Completions taken before other tasks get their turn again: about half a millisecond of work.
_BATCH = 64


class Completion(NamedTuple):
    """How a transfer ended. Times are nanoseconds of ``time.monotonic_ns()``."""

    status: int
    """``KVF_OK`` (0) or a negative ``kvf_status``."""
    mode: int
    """How a sequence's transfer was done: 1 in place, 2 from a snapshot or ahead. Else 0."""
    bytes: int
    """Size of the state or of the regions."""
    fragments: int
    """Separate pieces of tensor memory that it consists of."""
    segments: int
    """What remained of them after joining runs and rows into blocks."""
    submitted_ns: int
    started_ns: int
    """When the first piece began to move; 0 if none did."""
    finished_ns: int
    listed_ns: int
    """Of a sequence's transfer: when libllama had taken cells and listed what to move. Else 0."""
    recorded_ns: int
    """Of a sequence's transfer: when it had named the last fragment. Else 0."""
    detail: str
    """One line on what went wrong, or ""."""


async def see_through(
    attempt: Callable[[], Awaitable[None]], on_cancel: Callable[[], None]
) -> None:
    """Awaits ``attempt()`` to its end. Cancellation calls ``on_cancel``, and goes on after the end.

    ``attempt`` has to stand being broken off and made again. The shield holds off cancel scopes;
    asyncio's ``Task.cancel()`` comes through it, each time once: hence the recursion, from which
    the latest cancellation emerges. (No exception is kept in a variable: its traceback would keep
    this frame, the frame the exception, and both the transfer's memory until the next collection.)
    """
    try:
        await attempt()
    except GeneratorExit:
        raise
    except anyio.get_cancelled_exc_class():
        on_cancel()
        with anyio.CancelScope(shield=True):
            await see_through(attempt, on_cancel)
        raise


class Pending:
    """Something that ends exactly once, and that tasks can wait for."""

    def __init__(self) -> None:
        self.ended = False
        self.turns: list[anyio.Event] = []  # of the tasks that wait for it


class PendingTransfer(Pending):
    """A job of the C library, as the bridge sees it."""

    job: int | None = None
    """Its handle; None until the submitting call has come back."""

    def completed(self, completion: Completion) -> None:
        raise NotImplementedError

    def withdrawn(self) -> None:
        raise NotImplementedError


class PendingCall(Pending):
    """A call on a worker thread, as the bridge sees it."""

    def returned(self) -> None:
        raise NotImplementedError


class Completions:
    """The completion queue of one engine, and everything in flight that ends through it.

    Every method belongs to the thread of the event loop, but for ``post``.
    """

    def __init__(self) -> None:
        queue = ffi.new("kvf_queue *")
        check(lib.kvf_queue_create(queue))
        self.queue: int = queue[0]
        self.closing = False
        # Set by the engine. Whoever waits keeps the engine alive, not only the transfer waited for.
        self.owner: weakref.ref[object] | None = None
        self._fd = check(lib.kvf_queue_fd(self.queue))
        self._process = os.getpid()
        self._records = ffi.new("kvf_completion[]", _BATCH)
        self._tokens = itertools.count(1)
        self._transfers: dict[int, PendingTransfer] = {}
        self._posted: deque[PendingCall] = deque()
        self._reader: anyio.Event | None = None
        self._followers: dict[anyio.Event, None] = {}  # in order of arrival
        self._loop: object = None

    # ---- What is in flight ---------------------------------------------------------------------

    def expect(self, transfer: PendingTransfer) -> int:
        """Notes a transfer that is about to be submitted. Returns its ``user_data``.

        Noting it first is what makes it safe to submit from another thread: the completion may be
        here before the submitting call has returned.
        """
        self.check_usable()
        # Picks up what nobody has waited for, so that buffers of forgotten transfers come free.
        if self._transfers and self._reader is None:
            self._drain()
        token = next(self._tokens)
        self._transfers[token] = transfer
        return token

    def withdraw(self, token: int) -> None:
        """Strikes out a transfer that could not be submitted."""
        transfer = self._transfers.pop(token)
        transfer.withdrawn()
        self._end(transfer)
        # It may be the reader's own, who would wait for a descriptor that stays silent.
        lib.kvf_queue_wake(self.queue)

    def transfers(self) -> list[PendingTransfer]:
        return list(self._transfers.values())

    def post(self, call: PendingCall) -> None:
        """Reports the end of a worker's call. For the worker's thread."""
        self._posted.append(call)
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

    async def until_ended(self, pending: Pending) -> None:
        """Waits until it has ended. May be cancelled, which leaves it in flight."""
        if pending.ended:
            await anyio.lowlevel.checkpoint()
            return
        self.check_process()
        self._enter_loop()
        owner = self.owner() if self.owner else None
        turn = anyio.Event()  # set when `pending` has ended, or when it is our turn to read
        if self._reader is None:
            self._reader = turn
        else:
            self._followers[turn] = None
            pending.turns.append(turn)
        try:
            if self._reader is not turn:
                await turn.wait()
            while not pending.ended:
                await anyio.wait_readable(self._fd)
                self._drain()
        finally:
            self._followers.pop(turn, None)
            if self._reader is turn:
                self._hand_on()
            del owner

    def _enter_loop(self) -> None:
        loop = anyio.lowlevel.current_token()
        if self._reader is None and not self._followers:
            self._loop = loop
        elif loop != self._loop:
            raise RuntimeError("an Engine can be used from one event loop at a time")

    def _hand_on(self) -> None:
        self._reader = next(iter(self._followers), None)
        if self._reader is not None:
            del self._followers[self._reader]
            self._reader.set()

    # ---- Reading -------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Takes what has arrived, a batch of each kind; the descriptor stays readable for the rest.

        Only the reader may call this while there is one: else its own transfer could end without
        the descriptor telling it.
        """
        self._take(0)
        self._take_posted()

    def _take(self, timeout_ns: int) -> int:
        count = check(
            lib.kvf_queue_take(
                self.queue, self._records, ffi.sizeof("kvf_completion"), _BATCH, timeout_ns
            )
        )
        for index in range(count):
            record = self._records[index]
            transfer = self._transfers.pop(record.user_data)
            transfer.completed(_completion(record))
            self._end(transfer)
        return count

    def _take_posted(self) -> None:
        for _ in range(min(len(self._posted), _BATCH)):
            call = self._posted.popleft()
            call.returned()
            self._end(call)
        if self._posted:
            lib.kvf_queue_wake(self.queue)

    def _end(self, pending: Pending) -> None:
        pending.ended = True
        turns, pending.turns = pending.turns, []
        for turn in turns:
            # A follower that has been made the reader has left the list, and has its event set.
            if turn in self._followers:
                del self._followers[turn]
                turn.set()

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
        for token, transfer in list(self._transfers.items()):
            if transfer.job is None:
                self.withdraw(token)
        deadline = time.monotonic() + seconds
        while self._transfers:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return False
            self._take(int(remaining * 1e9))
        return True

    def destroy(self) -> None:
        check(lib.kvf_queue_destroy(self.queue))


def _completion(record: CData) -> Completion:
    return Completion(
        record.status,
        record.mode,
        record.bytes,
        record.fragments,
        record.segments,
        record.submitted_ns,
        record.started_ns,
        record.finished_ns,
        record.listed_ns,
        record.recorded_ns,
        "" if record.status == lib.KVF_OK else ffi.string(record.detail).decode(errors="replace"),
    )
