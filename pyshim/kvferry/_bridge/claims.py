"""Who uses which host memory at the moment: one user that writes, or several that only read.

A transfer claims its buffers while it is in flight. Snapshots, Blocks and Checkpoints claim their
bytes while they live. A claim lasts as long as the Claim object, so that it ends however a call is
interrupted. One table serves the whole process, because several engines can be given the same
memory.
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
    """Keeps others from writing to memory while it lives; from reading too, if it writes."""

    __slots__ = ("__weakref__", "holder", "writing")

    def __init__(self, holder: str, writing: bool) -> None:
        self.holder = holder
        self.writing = writing


class _Reference(weakref.ref[Claim]):
    """A weak reference to a claim, with the key of the claim's entry in the table."""

    __slots__ = ("key",)

    key: tuple[int, int]


# The address of the memory, a number that no other entry has, the end of the memory, the claim.
_Entry = tuple[int, int, int, _Reference]


class _Table:
    def __init__(self) -> None:
        # Reentrant: the garbage collector may take down a forgotten engine in the middle of a call.
        self.lock = threading.RLock()
        self._entries: list[_Entry] = []  # sorted
        self._longest = 0  # bytes; no entry is longer
        self._numbers = itertools.count()
        # Claims end on any thread and at any time; the next call removes their entries.
        self._ended: deque[weakref.ref[Claim]] = deque()

    def add(self, begin: int, nbytes: int, claim: Claim) -> None:
        reference = _Reference(claim, self._ended.append)
        with self.lock:
            reference.key = (begin, next(self._numbers))
            bisect.insort(self._entries, (*reference.key, begin + nbytes, reference))
            self._longest = max(self._longest, nbytes)

    def find(self, begin: int, nbytes: int, writing: bool) -> Claim | None:
        """Returns a claim on part of this memory that forbids to read or write it, or None."""
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


# A forked child has its own memory, and none of the threads that hold locks or move bytes.
os.register_at_fork(after_in_child=_start_anew)


def claim_for_transfer(memory: CData, nbytes: int, *, writing: bool) -> Claim:
    """Claims a buffer. Raises Busy if a transfer in flight or a Snapshot already uses it."""
    begin = int(ffi.cast("uintptr_t", memory))
    claim = Claim(f"a transfer in flight {'writes' if writing else 'reads'}", writing)
    with _table.lock:
        other = _table.find(begin, nbytes, writing)
        if other is not None:
            raise error(lib.KVF_ERR_BUSY, f"{other.holder} this memory")
        _table.add(begin, nbytes, claim)
    return claim


def claim_for_saved(memory: CData, nbytes: int, kind: str) -> Claim:
    """Claims bytes that have just been saved. The claim of their transfer may still last a moment.

    ``kind`` is the name of the class that holds them.
    """
    claim = Claim(f"a {kind} that has not been closed has", writing=False)
    _table.add(int(ffi.cast("uintptr_t", memory)), nbytes, claim)
    return claim
