"""The tier in RAM: blocks and checkpoints in buffers, within a budget."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from ..blocks import Block, Checkpoint
from .description import Description, Kind
from .s3_fifo import S3Fifo

Id = tuple[Kind, bytes]
C = TypeVar("C")


@dataclass(eq=False)
class Entry:
    """A block or a checkpoint that is kept in RAM."""

    description: Description
    part: Block | Checkpoint
    capacity: int
    """The bytes that its buffer takes."""
    holds: int = 0
    """How many transfers use it now, and how many pins it has: it is not evicted."""
    expires: float | None = None
    """A time of ``time.monotonic``; None: never."""

    @property
    def id(self) -> Id:
        return self.description.kind, self.description.key


class Ram:
    """Blocks and checkpoints in buffers. For one thread; any thread may call ``find`` and ``ends``.

    A block goes only after the blocks that follow it and the checkpoint at its end: without those
    before it a block is of no use.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        """Bytes of the buffers of all entries."""
        self.reserved = 0
        """Bytes of buffers that are being filled."""
        self.evicted = 0
        """Entries evicted so far to make room."""
        self._entries: dict[Id, Entry] = {}
        self._order: S3Fifo[Id] = S3Fifo()
        self._standing_on: Counter[bytes] = Counter()  # a block's key: entries that need the block
        self._ends: dict[bytes, Counter[int]] = {}  # a parent: where entries that have it end
        self._expiring: dict[Id, Entry] = {}

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries.values()))

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, kind: Kind, key: bytes) -> Entry | None:
        """Returns an entry unless there is none or its time is over."""
        entry = self._entries.get((kind, key))
        if entry is None or (entry.expires is not None and entry.expires <= time.monotonic()):
            return None
        return entry

    def has(self, entry: Entry) -> bool:
        """Whether this entry is still kept."""
        return self._entries.get(entry.id) is entry

    def renew(self, kind: Kind, key: bytes, expires: float | None) -> Entry | None:
        """Returns an entry, also one whose time is over, which is kept as long as this asks at
        least."""
        entry = self._entries.get((kind, key))
        if entry is not None and entry.expires is not None:
            if expires is None:
                entry.expires = None
                del self._expiring[entry.id]
            else:
                entry.expires = max(entry.expires, expires)
        return entry

    def find(self, kind: Kind, key: bytes) -> Description | None:
        """As ``get``, without the bytes."""
        entry = self.get(kind, key)
        return None if entry is None else entry.description

    def ends(self, parent: bytes) -> list[int]:
        """Where the entries with this parent end."""
        return list(self._ends.get(parent, ()))

    def use(self, entries: Iterable[Entry]) -> None:
        """Notes that entries have been of use."""
        for entry in entries:
            self._order.use(entry.id)

    @contextmanager
    def held(self, entries: Sequence[Entry]) -> Iterator[None]:
        """While this is entered the entries are not evicted."""
        for entry in entries:
            entry.holds += 1
        try:
            yield
        finally:
            for entry in entries:
                entry.holds -= 1

    # ---- Room -----------------------------------------------------------------------------------

    def reserve(self, nbytes: int) -> bool:
        """Makes room for a buffer, for which it evicts others. False: there is no such room."""
        if nbytes > self.limit:
            return False
        self._remove_expired()
        while self.used + self.reserved + nbytes > self.limit:
            if (chosen := self._order.evict(self._may_go)) is None:
                return False
            self._drop(self._entries[chosen])
            self.evicted += 1
        self.reserved += nbytes
        return True

    def unreserve(self, nbytes: int) -> None:
        self.reserved -= nbytes

    def add(self, entry: Entry) -> bool:
        """Keeps an entry whose room is not reserved any more. False: it is there already, or there
        is no room; it has been closed then."""
        if entry.id in self._entries or not self.reserve(entry.capacity):
            entry.part.close()
            return False
        self.unreserve(entry.capacity)
        self.used += entry.capacity
        self._entries[entry.id] = entry
        if entry.expires is not None:
            self._expiring[entry.id] = entry
        self._order.add(entry.id, entry.capacity)
        description = entry.description
        self._standing_on[self._stands_on(description)] += 1
        self._ends.setdefault(description.parent, Counter())[description.end] += 1
        return True

    def remove(self, entry: Entry) -> bool:
        """Removes an entry. False: it is held, or others stand on it."""
        if self._entries.get(entry.id) is not entry or not self._may_go(entry.id):
            return False
        self._order.remove(entry.id)
        self._drop(entry)
        return True

    def remove_all(self, entries: Iterable[Entry]) -> int:
        """Removes those of the entries that nothing else needs; returns how many."""
        last_first = sorted(
            entries, key=lambda entry: (entry.description.end, entry.description.kind), reverse=True
        )
        return sum(map(self.remove, last_first))

    # ---- Inside ---------------------------------------------------------------------------------

    @staticmethod
    def _stands_on(description: Description) -> bytes:
        return description.parent if description.kind == "block" else description.key

    def _may_go(self, chosen: Id) -> bool:
        kind, key = chosen
        return self._entries[chosen].holds == 0 and not (
            kind == "block" and self._standing_on[key] > 0
        )

    def _drop(self, entry: Entry) -> None:
        """The entry is not in ``_order`` any more."""
        del self._entries[entry.id]
        self._expiring.pop(entry.id, None)
        self.used -= entry.capacity
        description = entry.description
        _subtract(self._standing_on, self._stands_on(description))
        ends = self._ends[description.parent]
        _subtract(ends, description.end)
        if not ends:
            del self._ends[description.parent]
        entry.part.close()

    def _remove_expired(self) -> None:
        now = time.monotonic()
        self.remove_all([each for each in self._expiring.values() if (each.expires or 0) <= now])


def _subtract(counts: Counter[C], counted: C) -> None:
    """Counts one less. A Counter keeps what it has counted to 0 otherwise."""
    counts[counted] -= 1
    if not counts[counted]:
        del counts[counted]
