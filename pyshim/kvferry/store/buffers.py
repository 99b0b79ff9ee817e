"""Buffers of the engines' pools, within the budget of RAM."""

from __future__ import annotations

import anyio

from ..buffer import Buffer
from ..llama import Llama
from .behind import Behind
from .ram import Ram, Room, most_taken


class Buffers:
    """Takes buffers for what is saved or read. For the thread of the event loop."""

    def __init__(self, ram: Ram, behind: Behind | None) -> None:
        self._ram = ram
        self._behind = behind

    async def take(self, llama: Llama, nbytes: int) -> tuple[Buffer, Room] | None:
        """Takes a buffer of the engine of ``llama``, and the room for it. None: there is no room.

        What is being written to the disk cannot be evicted: this waits for the writes, unless the
        disk hangs. Raises PinnedLimit, OutOfMemory, EngineClosed.
        """
        room = await self._reserve(most_taken(nbytes))
        if room is None:
            return None
        try:
            # A call that is cancelled may hold its buffer a little longer than the room.
            with anyio.CancelScope(shield=True):
                buffer = await llama.allocate(nbytes)
            room.shrink(buffer.capacity)
        except BaseException:
            room.release()
            raise
        try:
            await anyio.lowlevel.checkpoint_if_cancelled()
        except BaseException:
            buffer.close()
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
