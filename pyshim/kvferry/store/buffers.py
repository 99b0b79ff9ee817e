"""Buffers of the engines' pools, within the budget of RAM."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import anyio

from ..buffer import Buffer
from ..llama import Llama
from .behind import Behind
from .ram import Ram, Room, most_taken
from .tracing import traced

_AT_ONCE = 16
"""So many buffers are taken by one call: until then, the most that each may take is set aside."""


class Buffers:
    """Takes buffers for saves and reads. For the thread of the event loop."""

    def __init__(self, ram: Ram, behind: Behind | None) -> None:
        self._ram = ram
        self._behind = behind

    @traced("wait for a buffer", lambda _self, _llama, nbytes: {"bytes": nbytes})
    async def take(self, llama: Llama, nbytes: int) -> tuple[Buffer, Room] | None:
        """Takes a buffer of the engine of ``llama``, and the room for it; None if there is no room.

        Entries that are being written to the disk cannot be evicted: this waits for their writes,
        unless the disk hangs. Raises PinnedLimit, OutOfMemory, EngineClosed.
        """
        room = await self._reserve(most_taken(nbytes))
        if room is None:
            return None

        async def allocate() -> list[Buffer]:
            return [await llama.allocate(nbytes)]

        return (await _fill(allocate, [room]))[0]

    @traced("wait for a buffer")
    async def take_first(self, llama: Llama, sizes: Sequence[int]) -> list[tuple[Buffer, Room]]:
        """As ``take``, for the first buffers of these sizes: for at least one, if there is room."""
        if not sizes or (first := await self._reserve(most_taken(sizes[0]))) is None:
            return []
        rooms = [first]
        for nbytes in sizes[1:_AT_ONCE]:
            if (room := self._ram.reserve(most_taken(nbytes))) is None:
                break
            rooms.append(room)
        return await _fill(lambda: llama._allocate_each(sizes[: len(rooms)]), rooms)

    async def _reserve(self, nbytes: int) -> Room | None:
        while (room := self._ram.reserve(nbytes)) is None:
            behind = self._behind if nbytes <= self._ram.limit else None
            if behind is None or not await behind.write_ends():
                self._ram.refused["budget"] += 1
                return None
        return room


async def _fill(
    allocate: Callable[[], Awaitable[list[Buffer]]], rooms: Sequence[Room]
) -> list[tuple[Buffer, Room]]:
    """Takes a buffer for each of the rooms, or releases the rooms."""
    buffers: list[Buffer] = []
    try:
        # A call that is cancelled may hold its buffers a little longer than the room.
        with anyio.CancelScope(shield=True):
            buffers = await allocate()
        for buffer, room in zip(buffers, rooms, strict=True):
            room.shrink(buffer.capacity)
        await anyio.lowlevel.checkpoint_if_cancelled()
    except BaseException:
        for buffer in buffers:
            buffer.close()
        for room in rooms:
            room.release()
        raise
    return list(zip(buffers, rooms, strict=True))
