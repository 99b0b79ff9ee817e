"""Who uses which host memory at the moment: one that writes, or several that only read.

A transfer claims its buffer while it is in flight, a Snapshot its bytes while it lives. A claim
lasts as long as its object: whatever breaks off a call, a claim that nobody holds is none. One
table serves the whole process, since engines can be given the same memory.
"""

from __future__ import annotations

import bisect
import itertools
import os
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING

from .._native import ffi, lib
from ..errors import error

if TYPE_CHECKING:
    from .._native import CData


class Claim:
    """Keeps writers away from memory, or everybody if it writes itself, until it is dropped."""

    __slots__ = ("__weakref__", "holder", "writing")

    def __init__(self, holder: str, writing: bool) -> None:
        self.holder = holder
        self.writing = writing


class _Reference(weakref.ref[Claim]):
    """Refers to a claim, and knows which entry of the table is that claim's."""

    __slots__ = ("key",)

    key: tuple[int, int]


# Where the memory begins, a number that no other entry has, where the memory ends, and the claim.
_Entry = tuple[int, int, int, _Reference]


class _Table:
    def __init__(self) -> None:
        # Reentrant: a collection in the middle of a call may take down a forgotten engine.
        self.lock = threading.RLock()
        self._entries: list[_Entry] = []  # sorted
        self._longest = 0  # bytes; no entry is longer
        self._numbers = itertools.count()
        # Claims end on any thread and at any time: what is to be done then waits for the next call.
        self._ended: deque[weakref.ref[Claim]] = deque()

    def add(self, begin: int, nbytes: int, claim: Claim) -> None:
        reference = _Reference(claim, self._ended.append)
        with self.lock:
            reference.key = (begin, next(self._numbers))
            bisect.insort(self._entries, (*reference.key, begin + nbytes, reference))
            self._longest = max(self._longest, nbytes)

    def find(self, begin: int, nbytes: int, writing: bool) -> Claim | None:
        """A claim on a part of this memory that forbids to use it so."""
        with self.lock:
            self._forget_ended()
            end = begin + nbytes
            for index in reversed(range(bisect.bisect_left(self._entries, (end,)))):
                its_begin, _, its_end, reference = self._entries[index]
                if its_begin + self._longest <= begin:
                    break
                claim = reference()
                if claim is not None and its_end > begin and (writing or claim.writing):
                    return claim
            return None

    def _forget_ended(self) -> None:
        while self._ended:
            reference = self._ended[0]
            assert isinstance(reference, _Reference)
            index = bisect.bisect_left(self._entries, reference.key)
            if index < len(self._entries) and self._entries[index][3] is reference:
                del self._entries[index]
            self._ended.popleft()
        if not self._entries:
            self._longest = 0


_table = _Table()


def _start_anew() -> None:
    global _table
    _table = _Table()


# The child has none of the threads that hold locks or move bytes, and memory of its own.
os.register_at_fork(after_in_child=_start_anew)


def claim_for_transfer(memory: CData, nbytes: int, *, writing: bool) -> Claim:
    """Claims a buffer. Raises Busy where a transfer in flight or a Snapshot is in the way."""
    begin = int(ffi.cast("uintptr_t", memory))
    claim = Claim(f"a transfer in flight {'writes' if writing else 'reads'}", writing)
    with _table.lock:
        other = _table.find(begin, nbytes, writing)
        if other is not None:
            raise error(lib.KVF_ERR_BUSY, f"{other.holder} this memory")
        _table.add(begin, nbytes, claim)
    return claim


def claim_for_snapshot(memory: CData, nbytes: int) -> Claim:
    """Claims what has just been saved; its transfer's own claim ends a little later."""
    claim = Claim("a Snapshot that has not been closed has", writing=False)
    _table.add(int(ffi.cast("uintptr_t", memory)), nbytes, claim)
    return claim
