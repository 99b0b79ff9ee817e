"""The queue of a tier: entries that are in RAM already, and that tasks write to the tier."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import anyio

from .ram import Entry

N = TypeVar("N")

log = logging.getLogger("kvferry.store")


class Writes(Generic[N]):
    """A queue of entries of RAM, and of notes ``N``, which tasks write to a tier.

    An entry is not evicted from RAM before its write has ended. For the thread of the event loop.
    """

    def __init__(self, tier: str, write: Callable[[Entry | N], Awaitable[bool]]) -> None:
        """``write`` returns whether something was written. What it raises is in the log, which
        calls the tier ``tier``."""
        self._tier = tier
        self._write = write
        self._send, self._receive = anyio.create_memory_object_stream[Entry | N](math.inf)
        self._entries: set[Entry] = set()
        self._closed = False
        self.ended = anyio.Event()
        """Is set when a write ends. Another event then replaces it."""
        self.pending = 0
        """Writes that have not ended."""
        self.pending_bytes = 0
        """The bytes of the buffers of entries whose writes have not ended."""
        self.failed = 0
        """Writes that have failed or were refused."""

    async def run(self) -> None:
        """Writes everything that ``add`` gets, one at a time, until this is cancelled."""
        async for what in self._receive:
            try:
                if not await self._write(what):
                    self.failed += 1
            except Exception as problem:
                self.failed += 1
                log.warning("a write to %s failed: %r", self._tier, problem, exc_info=True)
            finally:
                self._end(what)

    def __contains__(self, entry: Entry) -> bool:
        """Whether an entry waits, or is being written."""
        return entry in self._entries

    def add(self, what: Entry | N) -> None:
        """Adds an entry or a note to the queue. Does nothing after ``close``: a ``keep`` may still
        run when the program leaves the store."""
        if self._closed:
            return
        if isinstance(what, Entry):
            what.holds += 1
            self._entries.add(what)
            self.pending_bytes += what.capacity
        self.pending += 1
        self._send.send_nowait(what)

    def close(self) -> None:
        """Takes no more entries. May be repeated."""
        self._closed = True
        self._send.close()

    def drop(self) -> None:
        """Drops all entries that wait. Call this after ``close``, when no ``run`` runs."""
        with contextlib.suppress(anyio.EndOfStream):
            while True:
                self._end(self._receive.receive_nowait())
        self._receive.close()

    def _end(self, what: Entry | N) -> None:
        if isinstance(what, Entry):
            what.holds -= 1
            self._entries.discard(what)
            self.pending_bytes -= what.capacity
        self.pending -= 1
        self.ended.set()
        self.ended = anyio.Event()
