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
from .conversation import Turn, hold_conversation
from .moved import Moved

T = TypeVar("T")

CONVERSATION = "conversation"
"""The key of ``Prepared.conversation``."""


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
        self,
        direction: Direction,
        memory: Memory = "pinned",
        mode: LoadMode = "auto",
        moved: Moved = "state",
    ) -> Samples:
        """As ``time_transfers``."""
        key = _key(direction, memory, mode, moved)
        return await self.once(key, lambda: time_transfers(self, direction, memory, mode, moved))

    def known_transfers(
        self, direction: Direction, memory: Memory = "pinned", mode: LoadMode = "auto"
    ) -> Samples | None:
        """As ``known``."""
        return cast("Samples | None", self.known(_key(direction, memory, mode, "state")))

    async def native(self, direction: Direction, memory: Memory) -> float:
        """As ``time_native``."""
        key = f"native {direction} {memory}"
        return await self.once(key, lambda: time_native(self, direction, memory))

    async def beside(
        self, direction: Direction, rounds: int, steps: int, moved: Moved = "state"
    ) -> Beside:
        """As ``decode_beside``."""
        return await self.once(
            beside_key(direction, moved),
            lambda: decode_beside(self, direction, rounds, steps, moved),
        )

    async def conversation(self) -> list[Turn]:
        """As ``hold_conversation``."""
        return await self.once(CONVERSATION, lambda: hold_conversation(self))


def _key(direction: Direction, memory: Memory, mode: LoadMode, moved: Moved) -> str:
    return f"{direction} {memory} {mode} {moved}"


def beside_key(direction: Direction, moved: Moved) -> str:
    """Returns the key of ``Prepared.beside``."""
    return f"beside {direction} {moved}"
