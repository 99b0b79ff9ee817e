"""Buffers of the engines' pools, within the budget of RAM."""

from __future__ import annotations

from collections.abc import Sequence

from ..buffer import Buffer
from ..llama import Llama
from .behind import Behind
from .ram import Ram, Room, most_taken
from .tracing import traced

_AT_ONCE = 16
"""So many buffers are taken by one call: until then, the most that each may take is set aside."""


class Buffers:
    """Takes buffers for what is saved or read. For the thread of the event loop."""

    def __init__(self, ram: Ram, behind: Behind | None) -> None:
        self._ram = ram
        self._behind = behind

    @traced("wait for a buffer", lambda _self, _llama, nbytes: {"bytes": nbytes})
    async def take(self, llama: Llama, nbytes: int) -> tuple[Buffer, Room] | None:
        """Takes a buffer of the engine of ``llama``, and the room for it. None: there is no room.

        What is being written to the disk cannot be evicted: this waits for the writes, unless the
        disk hangs. Raises PinnedLimit, OutOfMemory, EngineClosed.
        """
        room = await self._reserve(most_taken(nbytes))
        if room is None:
            self._ram.refused["budget"] += 1
            return None
        try:
            buffer = await llama.allocate(nbytes)
            room.shrink(buffer.capacity)
        except BaseException:
            room.release()
            raise
        return buffer, room

    async def take_first(self, llama: Llama, sizes: Sequence[int]) -> list[tuple[Buffer, Room]]:
        """As ``take``, for the first buffers of these sizes: for at least one, if there is room."""
        if not sizes or (first := await self._reserve(most_taken(sizes[0]))) is None:
            return []
        rooms = [first]
        try:
            for nbytes in sizes[1:_AT_ONCE]:
                if (room := self._ram.reserve(most_taken(nbytes))) is None:
                    break
                rooms.append(room)
            buffers = await llama._allocate_each(sizes[: len(rooms)])
            for buffer, room in zip(buffers, rooms, strict=True):
                room.shrink(buffer.capacity)
        except BaseException:
            for room in rooms:
                room.release()
            raise
        return list(zip(buffers, rooms, strict=True))

    async def _reserve(self, nbytes: int) -> Room | None:
        while (room := self._ram.reserve(nbytes)) is None:
            if nbytes > self._ram.limit or self._behind is None:
                return None
            if not await self._behind.write_ends():
                return None
        return room
