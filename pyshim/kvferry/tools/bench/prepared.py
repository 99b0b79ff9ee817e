"""A prepared context, in which several figures share a measurement.

What is compared is measured in turn, so that changes of the machine's speed affect all alike.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from ... import LoadMode
from ..limits import Direction
from .alone import Samples, time_native, time_transfers
from .beside import Beside, decode_beside
from .context import Memory, PreparedContext

T = TypeVar("T")


@dataclass
class Prepared(PreparedContext):
    """Measures only once, and then returns the same again."""

    _known: dict[str, Any] = field(default_factory=dict)

    async def once(self, key: str, make: Callable[[], Awaitable[T]]) -> T:
        """Returns what ``make`` returned the first time: several measurements share it."""
        if key not in self._known:
            self._known[key] = await make()
        return cast(T, self._known[key])

    def known(self, key: str) -> Any:
        """Returns what ``once`` has made under this key; None if nothing, or if that has failed."""
        return self._known.get(key)

    async def transfers(
        self, direction: Direction, memory: Memory = "pinned", mode: LoadMode = "auto"
    ) -> Samples:
        """As ``time_transfers``."""
        key = _key(direction, memory, mode)
        return await self.once(key, lambda: time_transfers(self, direction, memory, mode))

    def known_transfers(
        self, direction: Direction, memory: Memory = "pinned", mode: LoadMode = "auto"
    ) -> Samples | None:
        """As ``known``."""
        return cast("Samples | None", self.known(_key(direction, memory, mode)))

    async def native(self, direction: Direction, memory: Memory) -> float:
        """As ``time_native``."""
        key = f"native {direction} {memory}"
        return await self.once(key, lambda: time_native(self, direction, memory))

    async def beside(self, direction: Direction, rounds: int, steps: int) -> Beside:
        """As ``decode_beside``."""
        key = f"beside {direction}"
        return await self.once(key, lambda: decode_beside(self, direction, rounds, steps))


def _key(direction: Direction, memory: Memory, mode: LoadMode) -> str:
    return f"{direction} {memory} {mode}"
