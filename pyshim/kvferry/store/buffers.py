"""Buffers of the engines' pools, within the budget of RAM."""

from __future__ import annotations

from ..buffer import Buffer
from ..llama import Llama
from .behind import Behind
from .ram import Ram, Room, most_taken


class Buffers:
    """Takes buffers for saves and reads. For the thread of the event loop."""

    def __init__(self, ram: Ram, behind: Behind | None) -> None:
        self._ram = ram
        self._behind = behind

    async def take(self, llama: Llama, nbytes: int) -> tuple[Buffer, Room] | None:
        """Takes a buffer of the engine of ``llama``, and the room for it; None if there is no room.

        Entries that are being written to the disk cannot be evicted: this waits for their writes,
        unless the disk hangs. Raises PinnedLimit, OutOfMemory, EngineClosed.
        """
        room = await self._reserve(most_taken(nbytes))
        if room is None:
            return None
        try:
            buffer = await llama.allocate(nbytes)
            room.shrink(buffer.capacity)
        except BaseException:
            room.release()
            raise
        return buffer, room

    async def _reserve(self, nbytes: int) -> Room | None:
        while (room := self._ram.reserve(nbytes)) is None:
            if nbytes > self._ram.limit or self._behind is None:
                return None
            if not await self._behind.write_ends():
                return None
        return room
