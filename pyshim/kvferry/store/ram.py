"""The tier in RAM: blocks and checkpoints in buffers, within a budget."""

from __future__ import annotations

import mmap
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from ..blocks import Block, Checkpoint
from .counts import Refusals
from .description import Description, Kind
from .s3_fifo import S3Fifo

Id = tuple[Kind, bytes]
C = TypeVar("C")


def most_taken(nbytes: int) -> int:
    """Returns the most bytes that a buffer of ``nbytes`` may take of a pool.

    kvferry.h says at kvf_buffer_alloc how much sizes are rounded up, and how much larger a free
    buffer may be.
    """
    rounded = nbytes + nbytes // 16 + mmap.PAGESIZE
    return rounded + rounded // 4


@dataclass(eq=False)
class Entry:
    """A block or a checkpoint that is kept in RAM."""

    description: Description
    part: Block | Checkpoint
    capacity: int
    """The bytes that its buffer takes."""
    holds: int = 0
    """How many transfers and writes use it now: it is not evicted."""
    expires: float | None = None
    """A time of ``time.monotonic``; None: never."""

    @property
    def id(self) -> Id:
        return self.description.kind, self.description.key


class Room:
    """Bytes of the budget that are set aside for a buffer, until ``release``."""

    def __init__(self, ram: Ram, nbytes: int) -> None:
        self._ram = ram
        self.nbytes = nbytes
        ram.reserved += nbytes

    def shrink(self, nbytes: int) -> None:
        """Keeps at most this many bytes set aside."""
        unused = max(0, self.nbytes - nbytes)
        self.nbytes -= unused
        self._ram.reserved -= unused

    def release(self) -> None:
        """Idempotent."""
        self.shrink(0)


class Ram:
    """Blocks and checkpoints in buffers. For one thread; any thread may call ``find`` and ``ends``.

    A block is evicted only after the blocks that follow it and the checkpoint at its end, because a
    block is useless without the blocks before it.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        """Bytes of the buffers of all entries."""
        self.reserved = 0
        """Bytes of buffers that are being filled."""
        self.evicted = 0
        """Entries evicted so far to make room."""
        self.refused: Refusals = Refusals()
        """What there was no room for, and loads of what is here."""
        self.pinned: Counter[Id] = Counter()
        """How many pins each part has, whether or not RAM has the part now. Pinned parts are not
        evicted. Any thread may test whether a part is among them."""
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
        """Returns an entry; None if there is none, or its time to live is over."""
        entry = self._entries.get((kind, key))
        if entry is None or (entry.expires is not None and entry.expires <= time.monotonic()):
            return None
        return entry

    def entry(self, chosen: Id) -> Entry | None:
        """Returns an entry, even one whose time to live is over."""
        return self._entries.get(chosen)

    def renew(self, kind: Kind, key: bytes, expires: float | None) -> Entry | None:
        """Returns an entry, even one whose time to live is over, and extends that time to
        ``expires`` (None: without end)."""
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
        """Returns where the entries with this parent end."""
        return list(self._ends.get(parent, ()))

    def use(self, entries: Iterable[Entry]) -> None:
        """Notes a use of entries."""
        for entry in entries:
            self._order.use(entry.id)

    @contextmanager
    def held(self, entries: Sequence[Entry]) -> Iterator[None]:
        """Keeps the entries from being evicted in the ``with`` block."""
        for entry in entries:
            entry.holds += 1
        try:
            yield
        finally:
            for entry in entries:
                entry.holds -= 1

    # ---- Room -----------------------------------------------------------------------------------

    def reserve(self, nbytes: int) -> Room | None:
        """Sets room aside for a buffer, and evicts entries for it. Returns None if there is no
        room."""
        if nbytes > self.limit:
            return None
        self._remove_expired()
        while self.used + self.reserved + nbytes > self.limit:
            if (chosen := self._order.evict(self._may_go)) is None:
                return None
            self._drop(self._entries[chosen])
            self.evicted += 1
        return Room(self, nbytes)

    def add(self, entry: Entry, room: Room) -> Entry:
        """Keeps an entry in the room that was set aside for its buffer.

        Returns the entry that is kept now. If RAM had one of this kind and key before, that is the
        older one: it lives as long as either of them would, and ``entry`` has been closed.
        """
        room.release()
        if (known := self.renew(*entry.id, entry.expires)) is not None:
            entry.part.close()
            return known
        self.used += entry.capacity
        self._entries[entry.id] = entry
        if entry.expires is not None:
            self._expiring[entry.id] = entry
        self._order.add(entry.id, entry.capacity)
        description = entry.description
        self._standing_on[self._stands_on(description)] += 1
        self._ends.setdefault(description.parent, Counter())[description.end] += 1
        return entry

    def pin(self, ids: Iterable[Id]) -> None:
        self.pinned.update(ids)

    def unpin(self, ids: Iterable[Id]) -> None:
        for each in ids:
            _subtract(self.pinned, each)

    def remove(self, entry: Entry) -> bool:
        """Removes an entry. Returns False if it is held or pinned, or other entries need it."""
        if self._entries.get(entry.id) is not entry or not self._may_go(entry.id):
            return False
        self._order.remove(entry.id)
        self._drop(entry)
        return True

    def remove_all(self, entries: Iterable[Entry]) -> int:
        """Removes those of the entries that nothing else needs. Returns how many."""
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
        if self._entries[chosen].holds or chosen in self.pinned:
            return False
        return kind != "block" or key not in self._standing_on

    def _drop(self, entry: Entry) -> None:
        """Forgets an entry that has been removed from ``_order``."""
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
    """Counts one less, and removes a count of 0, which a Counter would keep."""
    counts[counted] -= 1
    if not counts[counted]:
        del counts[counted]
