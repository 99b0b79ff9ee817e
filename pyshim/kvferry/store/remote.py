"""The remote tier: blocks and checkpoints as objects, such as in a bucket of S3."""

from __future__ import annotations

import dataclasses
import functools
import logging
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import anyio
import anyio.to_thread
import xxhash

from .breaker import Breaker, Open
from .counts import Reason, Refusals
from .description import Description, Kind
from .objects import PIECE_BYTES, Full, Objects, Refused, Unavailable, first_line
from .part_format import (
    HEADER_BYTES,
    Damaged,
    Newer,
    check,
    header_of,
    name_of,
    parse_header,
)

T = TypeVar("T")

log = logging.getLogger("kvferry.store")

TRANSFERS = 16
"""Reads and writes at a time. Searches do not wait for them."""
_THREADS = 4 * TRANSFERS
"""More than transfers, because a call that hangs keeps its thread for a while."""
_ATTEMPTS = 3
_BACK_OFF = 0.1
"""Seconds before the second attempt, at most; twice as many before each further one."""
_SLOWEST = 4 << 20
"""A timeout is one second longer for every so many bytes."""
_POLL = 0.02
"""Seconds."""
_NOTE_BYTES = 1 << 16
"""The most bytes of a note."""


class Calls:
    """Counts the calls that run on threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0

    def counted(self, function: Callable[[], T]) -> Callable[[], T]:
        def call() -> T:
            with self._lock:
                self._running += 1
            try:
                return function()
            finally:
                with self._lock:
                    self._running -= 1

        return call

    async def ended(self) -> None:
        """Returns when no call runs. Polls, because the event loop of a late call may be gone."""
        running = True
        while running:
            await anyio.sleep(_POLL)  # first, as a thread may be about to start
            running = self._running > 0


class Remote:
    """Parts as objects of the same format as the disk tier's files, named by kind and key.

    For tasks of one event loop, of any kind. No method raises because of the object store: a call
    that fails is a miss, and a line is in the log. After several failures in a row the object store
    is *left alone*: for a while no call is made.

    ``timeout`` is how many seconds an attempt has that moves few bytes. ``find_timeout`` is for all
    that one search asks for.
    """

    def __init__(
        self,
        objects: Objects,
        *,
        name: str = "the remote tier",
        timeout: float = 2.0,
        find_timeout: float = 1.0,
        breaker: Breaker | None = None,
    ) -> None:
        self._objects = objects
        self._name = name
        self._timeout, self._find_timeout = timeout, find_timeout
        self._breaker = breaker or Breaker(name)
        self._put_breaker = self._breaker.another(f"writing to {name}")
        """Apart, so that a program that may not write goes on to read."""
        self._transfers = anyio.CapacityLimiter(TRANSFERS)
        self._threads = anyio.CapacityLimiter(_THREADS)
        self._unusable: dict[str, bool] = {}  # names, and whether a put may replace them
        self.written_bytes = self.read_bytes = self.failed = 0
        """``failed`` counts the calls that failed. An object that is not there is no failure."""
        self.refused: Refusals = Refusals()

    @property
    def left_alone(self) -> bool:
        """Whether a call would be refused now, because others have failed."""
        return self._breaker.would_refuse

    @property
    def find_timeout(self) -> float:
        return self._find_timeout

    @property
    def opened(self) -> int:
        """How often the circuit breaker has opened."""
        return self._breaker.opened + self._put_breaker.opened

    # ---- Parts ----------------------------------------------------------------------------------

    async def write(
        self, description: Description, data: bytes | memoryview, calls: Calls | None = None
    ) -> bool:
        """Keeps a part; it is in the object store when this returns True.

        A part that is there already is not sent again. Returns False if this failed. If the task is
        cancelled, the upload is aborted. Calls that were too late, or cancelled, may still read
        ``data``: they keep them alive, and ``calls`` counts them. Raises ValueError if the data
        have another length than described.
        """
        check(description)
        memory = memoryview(data).cast("B")
        if len(memory) != description.nbytes:
            raise ValueError("the data have another length than their description says")
        name = name_of(description.kind, description.key)
        size = HEADER_BYTES + len(memory)
        if name in self._unusable:
            if not self._unusable[name]:
                return False
        else:
            sizes = await self._call(
                functools.partial(self._objects.sizes, [name]), f"a look for {name}", self._timeout
            )
            if sizes is None:
                return False
            if sizes == [size]:
                return True
        if not await self._put(name, description, memory, calls or Calls()):
            return False
        self._unusable.pop(name, None)
        self.written_bytes += size
        return True

    async def sizes(
        self, parts: Sequence[tuple[Kind, bytes]], *, seconds: float | None = None
    ) -> list[int | None]:
        """Returns how many bytes of data each part has; None: it is not there, or not usable.

        ``seconds`` is the timeout, in place of ``find_timeout``.
        """
        names = [name_of(*part) for part in parts]
        found = await self._call(
            functools.partial(self._objects.sizes, names),
            "a search",
            self._find_timeout if seconds is None else seconds,
            attempts=1,
        )
        if found is None:
            return [None] * len(names)
        return [
            size - HEADER_BYTES
            if size is not None and size >= HEADER_BYTES and name not in self._unusable
            else None
            for name, size in zip(names, found, strict=True)
        ]

    async def read_into(
        self, description: Description, memory: memoryview, calls: Calls | None = None
    ) -> Description | None:
        """Fills ``memory``, of ``description.nbytes`` bytes, with the part's bytes.

        The checksum of the description is not looked at: it is the object's that counts. Returns
        the object's own description. Returns None if the object is not there, is not right, or was
        not received; then ``memory`` has any content, and calls that were too late may still write
        there, also if the task is cancelled: they keep it alive, and ``calls`` counts them.
        """
        calls = calls or Calls()
        check(description)
        view = memory.cast("B")
        if len(view) != description.nbytes:
            raise ValueError("the memory has another length than the part")
        name = name_of(description.kind, description.key)
        header = bytearray(HEADER_BYTES)
        missing = False

        async def read(begin: int) -> None:
            nonlocal missing
            piece = view[begin : begin + PIECE_BYTES]
            first = begin == 0
            memories = [memoryview(header), piece] if first else [piece]
            offset = 0 if first else HEADER_BYTES + begin
            async with self._transfers:
                count = await self._call(
                    calls.counted(functools.partial(self._get, name, offset, memories)),
                    f"a read of {name}",
                    self._seconds(sum(map(len, memories))),
                )
            missing |= count is None
            if count is not None and count != sum(map(len, memories)):
                # The object is too short. Its header decides what is told in the log.
                short.append(begin)

        short: list[int] = []
        async with anyio.create_task_group() as reads:
            for begin in range(0, max(1, len(view)), PIECE_BYTES):
                reads.start_soon(read, begin)
        if missing:
            return None
        try:
            found = parse_header(header)
            if dataclasses.replace(found, checksum=0) != dataclasses.replace(
                description, checksum=0
            ):
                raise Damaged("the object is not what its name, or its parent, says")
            if short:
                raise Damaged("the object is truncated")
            digest = await anyio.to_thread.run_sync(
                xxhash.xxh64_intdigest, view, limiter=self._threads
            )
            if digest != found.checksum:
                raise Damaged("the checksum is wrong")
        except (Damaged, Newer) as problem:
            self._put_aside(name, problem)
            return None
        self.read_bytes += HEADER_BYTES + len(view)
        return found

    async def remove(self, parts: Sequence[tuple[Kind, bytes]]) -> bool:
        """Returns whether the parts are not there any more."""
        names = [name_of(*part) for part in parts]

        def delete() -> bool:
            self._objects.delete(names)
            return True

        return await self._call(delete, "a removal", self._timeout) is not None

    def unusable(self, kind: Kind, key: bytes) -> bool:
        """Whether a part was read that was not right, and has not been written since."""
        return name_of(kind, key) in self._unusable

    # ---- Notes ----------------------------------------------------------------------------------

    async def note(self, kind: Kind, key: bytes, *, seconds: float | None = None) -> bytes | None:
        """Returns a note's bytes; None if it is not there, is not right, or was not received.

        ``seconds`` as of ``sizes``.
        """
        header, data = bytearray(HEADER_BYTES), bytearray(_NOTE_BYTES)
        name = name_of(kind, key)
        count = await self._call(
            functools.partial(self._get, name, 0, [memoryview(header), memoryview(data)]),
            f"a read of {name}",
            self._find_timeout if seconds is None else seconds,
            attempts=1,
        )
        if count is None:
            return None
        try:
            if count < HEADER_BYTES:
                raise Damaged("the object is truncated")
            found = parse_header(header)
            if (found.kind, found.key) != (kind, key):
                raise Damaged("the object has the name of another")
            if found.nbytes != count - HEADER_BYTES:
                raise Damaged("the object has another length than its header says")
            content = bytes(data[: found.nbytes])
            if xxhash.xxh64_intdigest(content) != found.checksum:
                raise Damaged("the checksum is wrong")
        except (Damaged, Newer) as problem:
            self._put_aside(name, problem)
            return None
        return content

    async def write_note(self, kind: Kind, key: bytes, content: bytes) -> bool:
        """Replaces a note: of two writers at a time, one loses. Returns whether it was written."""
        if len(content) > _NOTE_BYTES:
            raise ValueError("a note is too long")
        name = name_of(kind, key)
        if not self._unusable.get(name, True):
            return False
        checksum = xxhash.xxh64_intdigest(content)
        description = Description(kind, key, key, 0, 0, key, len(content), checksum)
        if not await self._put(name, description, memoryview(content), Calls()):
            return False
        self._unusable.pop(name, None)
        return True

    # ---- Calls ----------------------------------------------------------------------------------

    async def _put(
        self, name: str, description: Description, memory: memoryview, calls: Calls
    ) -> bool:
        header = memoryview(header_of(description))
        stopped = False
        attempts = 0

        def pieces(attempt: int) -> Iterator[memoryview]:
            for piece in (header, *_pieces(memory)):
                if stopped or attempt != attempts:
                    raise Refused("the upload was cancelled")
                yield piece

        def put() -> bool:
            nonlocal attempts
            attempts += 1
            self._objects.put(name, len(header) + len(memory), pieces(attempts))
            return True

        try:
            async with self._transfers:
                seconds = self._seconds(len(memory))
                counted = calls.counted(put)
                what = f"the write of {name}"
                breaker = self._put_breaker
                return await self._call(counted, what, seconds, breaker=breaker) is not None
        finally:
            stopped = True  # a thread that is still at it aborts the upload

    def _get(self, name: str, offset: int, memories: Sequence[memoryview]) -> int | None:
        """None: there is no such object. Blocks."""
        try:
            return self._objects.get(name, offset, memories)
        except FileNotFoundError:
            return None

    def _seconds(self, nbytes: int) -> float:
        return self._timeout + nbytes / _SLOWEST

    async def _call(
        self,
        function: Callable[[], T],
        what: str,
        seconds: float,
        *,
        attempts: int = _ATTEMPTS,
        breaker: Breaker | None = None,
    ) -> T | None:
        """Calls a function on a thread, with a timeout. Tries again if the object store was
        unavailable.

        Returns None if it failed; then a line is in the log.
        """
        problem: BaseException | None = None
        for attempt in range(attempts):
            if attempt:
                # Full jitter: calls that have failed together are not repeated together.
                await anyio.sleep(random.uniform(0, _BACK_OFF * 2 ** (attempt - 1)))
            try:
                return await self._attempt(function, seconds, breaker or self._breaker)
            except Open as refusal:
                problem = problem or refusal
                break
            except (Unavailable, TimeoutError) as failure:
                problem = failure
            except Exception as failure:
                problem = failure
                break
        self.failed += 1
        reason: Reason = "breaker_open" if isinstance(problem, Open) else "failed"
        self.refused[reason] += 1
        level = logging.DEBUG if isinstance(problem, Open) else logging.WARNING
        log.log(level, "%s: %s failed: %s", self._name, what, problem)
        return None

    async def _attempt(self, function: Callable[[], T], seconds: float, breaker: Breaker) -> T:
        trial = breaker.enter()
        known = False
        try:
            with anyio.fail_after(seconds):
                # Nobody waits for a thread that hangs. It occupies the limiter until its call ends.
                result = await anyio.to_thread.run_sync(
                    function, limiter=self._threads, abandon_on_cancel=True
                )
            known = True
            breaker.succeeded()
            return result
        except TimeoutError:
            known = True
            late = TimeoutError(f"no answer within {seconds:.3g} s")
            breaker.failed(trial, late)
            raise late from None
        except Full:
            known = True
            breaker.succeeded()  # it answers
            raise
        except Exception as problem:
            known = True
            breaker.failed(trial, first_line(problem))
            raise
        finally:
            if not known:
                breaker.cancelled(trial)

    def _put_aside(self, name: str, problem: Damaged | Newer) -> None:
        """Notes that an object is not right: it is not used any more. If it is damaged, the next
        write replaces it."""
        reason: Reason = "damaged" if isinstance(problem, Damaged) else "newer"
        self.refused[reason] += 1
        if name not in self._unusable:
            log.warning("%s: %s is not used: %s", self._name, name, problem)
        self._unusable[name] = isinstance(problem, Damaged)


def _pieces(memory: memoryview) -> Iterator[memoryview]:
    for begin in range(0, len(memory), PIECE_BYTES):
        yield memory[begin : begin + PIECE_BYTES]
