"""Which entry of a cache is evicted next: S3-FIFO, for entries of which some need others.

Yang and others describe S3-FIFO in "FIFO queues are all you need for cache eviction", SOSP 2023. A
small queue has new entries. The main queue has entries that were used while they were in the small
queue. A ghost queue has the keys of entries that left the small queue unused. So a scan passes
through the small queue, and the main queue stays as it was. No maintained library lets the program
say which entry may be evicted, and pins and prefixes need that.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K")

_MOST_USES = 3
_SMALL_SHARE = 0.1


class S3Fifo(Generic[K]):
    """The order of eviction. Sizes are bytes."""

    def __init__(self) -> None:
        self._small: OrderedDict[K, int] = OrderedDict()  # sizes; the oldest entry is the first
        self._main: OrderedDict[K, int] = OrderedDict()
        self._ghost: OrderedDict[K, None] = OrderedDict()
        self._uses: dict[K, int] = {}
        self._small_bytes = 0
        self._main_bytes = 0

    def add(self, key: K, nbytes: int) -> None:
        self._uses[key] = 0
        if key in self._ghost:
            del self._ghost[key]
            self._main[key] = nbytes
            self._main_bytes += nbytes
        else:
            self._small[key] = nbytes
            self._small_bytes += nbytes

    def use(self, key: K) -> None:
        self._uses[key] = min(_MOST_USES, self._uses[key] + 1)

    def remove(self, key: K) -> None:
        del self._uses[key]
        if key in self._small:
            self._small_bytes -= self._small.pop(key)
        else:
            self._main_bytes -= self._main.pop(key)

    def evict(self, may_go: Callable[[K], bool]) -> K | None:
        """Removes and returns the next entry that may go; None if no entry may."""
        small_is_large = self._small_bytes > _SMALL_SHARE * (self._small_bytes + self._main_bytes)
        if small_is_large or not self._main:
            turns = (self._evict_from_small, self._evict_from_main)
        else:
            turns = (self._evict_from_main, self._evict_from_small)
        for evict in turns:
            if (key := evict(may_go)) is not None:
                return key
        return None

    def _evict_from_small(self, may_go: Callable[[K], bool]) -> K | None:
        for _ in range(len(self._small)):
            key, nbytes = next(iter(self._small.items()))
            if self._uses[key] > 0:
                del self._small[key]
                self._small_bytes -= nbytes
                self._uses[key] = 0
                self._main[key] = nbytes
                self._main_bytes += nbytes
            elif may_go(key):
                self.remove(key)
                self._ghost[key] = None
                while len(self._ghost) > max(64, len(self._main) + len(self._small)):
                    self._ghost.popitem(last=False)
                return key
            else:
                self._small.move_to_end(key)
        return None

    def _evict_from_main(self, may_go: Callable[[K], bool]) -> K | None:
        # Each turn around the queue uses up one use of each entry.
        for _ in range((_MOST_USES + 1) * len(self._main)):
            key = next(iter(self._main))
            if may_go(key) and self._uses[key] == 0:
                self.remove(key)
                return key
            self._uses[key] = max(0, self._uses[key] - 1)
            self._main.move_to_end(key)
        return None
