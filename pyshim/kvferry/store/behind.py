"""The disk tier as tasks use it: reads on threads, and writes behind."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.to_thread
import xxhash

from .._bridge.block_list import BlocksAllowed
from .description import Description
from .disk import Disk, DiskStats
from .ram import Entry

T = TypeVar("T")

log = logging.getLogger("kvferry.store")

_THREADS = 4


class Behind:
    """A Disk whose calls run on threads of its own, and a task that writes to it."""

    def __init__(self, folder: str | os.PathLike[str], limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._limiter = anyio.CapacityLimiter(_THREADS)
        self._send, self._receive = anyio.create_memory_object_stream[
            Entry | tuple[Description, bytes]
        ](math.inf)
        self._write_ended = anyio.Event()
        self.pending = 0
        """Writes that have not ended."""
        self.failed = 0
        """Writes that have failed or were refused."""

    async def open(self) -> None:
        """Raises OSError."""
        self.disk = await self.call(Disk, self._folder, self._limit)

    async def call(self, function: Callable[..., T], *arguments: object) -> T:
        return await anyio.to_thread.run_sync(function, *arguments, limiter=self._limiter)

    # ---- Writes ---------------------------------------------------------------------------------

    def write(self, what: Entry | tuple[Description, bytes]) -> None:
        """Writes an entry of RAM later, or a note. The entry is not evicted before."""
        if isinstance(what, Entry):
            what.holds += 1
        self.pending += 1
        self._send.send_nowait(what)

    async def wait_for_a_write(self) -> None:
        """Returns when any write has ended."""
        await self._write_ended.wait()

    async def flush(self) -> None:
        """Returns when all writes have ended."""
        while self.pending:
            await self.wait_for_a_write()

    async def write_all(self) -> None:
        """Writes what ``write`` is given, until this is cancelled."""
        async for what in self._receive:
            try:
                if not await self.call(_write, self.disk, what):
                    self.failed += 1
            except OSError as problem:
                # What is kept in RAM stays there.
                self.failed += 1
                log.warning("a write to %s failed: %s", self._folder, problem)
            finally:
                if isinstance(what, Entry):
                    what.holds -= 1
                self.pending -= 1
                self._write_ended.set()
                self._write_ended = anyio.Event()

    # ---- Reads ----------------------------------------------------------------------------------

    async def read(self, description: Description, memory: memoryview) -> bool:
        """As ``Disk.read_into``; False for an OSError too, with a line in the log."""
        try:
            return await self.call(self.disk.read_into, description, memory)
        except OSError as problem:
            log.warning("a read from %s failed: %s", self._folder, problem)
            return False

    def layouts(self, model: bytes) -> dict[bytes, BlocksAllowed]:
        """The roots for which something was kept with a model. Blocks."""
        found = {}
        for note in self.disk.children(model):
            memory = bytearray(min(note.nbytes, 64))
            if note.kind == "layout" and note.nbytes <= 64 and self.disk.read_into(note, memory):
                found[note.key] = BlocksAllowed(memory.decode())
        return found

    def stats(self) -> DiskStats:
        """Blocks."""
        return self.disk.stats()

    async def close(self) -> None:
        self._send.close()
        await self.call(self.disk.close)


def _write(disk: Disk, what: Entry | tuple[Description, bytes]) -> bool:
    if not isinstance(what, Entry):
        description, data = what
        return disk.write(description, data)
    part = what.part
    return disk.write(dataclasses.replace(what.description, checksum=part.checksum), part.view)


def layout_note(model: bytes, root: bytes, allowed: BlocksAllowed) -> tuple[Description, bytes]:
    """A note that something is kept under a root, to be written."""
    data = allowed.value.encode()
    checksum = xxhash.xxh64_intdigest(data)
    return Description("layout", root, model, 0, 0, model, len(data), checksum), data
