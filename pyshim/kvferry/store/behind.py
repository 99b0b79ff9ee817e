"""The disk tier as tasks use it: reads on threads, and a task that writes.

If the disk fails or hangs, a line is in the log, and the tasks go on as if the disk had nothing. No
error reaches them.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Container, Iterable
from typing import TypeVar

import anyio
import anyio.to_thread

from .._bridge.block_list import BlocksAllowed
from ..errors import KvferryError
from .counts import Refusals
from .description import Description
from .disk import Disk
from .layout_notes import allowed_of, layout_note
from .part_format import HEADER_BYTES
from .ram import Entry, Id
from .threads import DiskThreads, Hanging, Progress
from .tracing import part_told, traced
from .writes import Writes

T = TypeVar("T")

log = logging.getLogger("kvferry.store")

_READERS = 4

LOOKUP_PATIENCE = 1.0
"""How many seconds a search waits while no system call of the disk ends."""
PATIENCE = 5.0
"""How many seconds a read waits likewise, and a task that needs the room of a pending write."""


class Behind:
    """A Disk whose calls run on threads of its own, and a task that writes to it."""

    def __init__(
        self, folder: str | os.PathLike[str], limit: int, pinned: Container[Id] = ()
    ) -> None:
        """``pinned`` is what the disk does not evict; it may change."""
        self._folder, self.limit, self._pinned = folder, limit, pinned
        self._progress = Progress()
        self._lookups = DiskThreads(1, LOOKUP_PATIENCE, self._progress)
        self._readers = DiskThreads(_READERS, PATIENCE, self._progress)
        self._writer = DiskThreads(1, PATIENCE, self._progress)
        self.writes: Writes[tuple[Description, bytes]] = Writes(str(folder), self._write)
        self._disk: Disk | None = None
        self._opened = anyio.Event()  # or it failed
        self._problem: Exception | None = None
        """Why the folder was not opened."""
        self._hangs = False  # whether the log says so
        self._noted: set[bytes] = set()  # roots whose notes are on the disk, or will be
        self._closed = False
        self.read_bytes = 0
        self.refused: Refusals = Refusals()
        """Calls that have failed, and for which the disk hung. The Disk counts the rest."""

    @property
    def is_open(self) -> bool:
        """Whether there is a ``disk``, also after ``close``."""
        return self._disk is not None

    async def open(self) -> None:
        """Raises OSError. If the folder hangs, this returns; the folder is used when it has been
        opened after all."""
        self._tasks = await anyio.create_task_group().__aenter__()
        for threads in (self._lookups, self._readers, self._writer):
            threads.open(self._tasks)
        self._tasks.start_soon(self._open_and_write)
        try:
            if not await self._writer.wait(self._opened):
                self._report("opening", Hanging("the disk does not answer"))
            elif self._problem is not None:
                raise self._problem
        except BaseException:
            await self.close()
            raise

    async def _open_and_write(self) -> None:
        try:
            await self._writer.to_its_end(self._open_disk)
        except Exception as problem:
            self._problem = problem
            if self._hangs:  # ``open`` has returned
                self._report("opening", problem)
        self._opened.set()
        await self.writes.run()

    def _open_disk(self) -> None:
        """For a thread, also one that nobody waits for any more."""
        disk = Disk(self._folder, self.limit, system=self._progress, pinned=self._pinned)
        self._disk = disk
        if self._closed:
            disk.close()

    @property
    def disk(self) -> Disk:
        """Raises OSError where the folder could not be opened, or has not been yet."""
        if self._disk is None:
            raise self._problem or Hanging("the disk does not answer")
        return self._disk

    async def close(self) -> None:
        """Begins no more calls, and waits for those that make progress. A call that hangs goes on
        on its thread."""
        self._closed = True
        self.writes.close()
        ended = []
        with anyio.CancelScope(shield=True):
            for threads in (self._lookups, self._readers, self._writer):
                ended.append(await threads.close())
        try:
            self._tasks.cancel_scope.cancel()
            await self._tasks.__aexit__(None, None, None)
        finally:
            self.writes.drop()
            if all(ended) and self._disk is not None:
                with anyio.move_on_after(PATIENCE, shield=True):
                    await anyio.to_thread.run_sync(self._disk.close, abandon_on_cancel=True)
            elif not all(ended):
                log.warning("%s hangs, and was not closed", self._folder)

    # ---- Writes ---------------------------------------------------------------------------------

    def note(self, model: bytes, root: bytes, allowed: BlocksAllowed) -> None:
        """Has a note written that something is kept under a root, unless that has been done."""
        if root not in self._noted:
            self._noted.add(root)
            self.writes.add(layout_note(model, root, allowed))

    async def write_ends(self) -> bool:
        """Returns True when a write has ended; False if none is pending, or the disk hangs."""
        if not self.writes.pending:
            return False
        if await self._writer.wait(self.writes.ended):
            return True
        self._report("a write", Hanging("the disk does not answer"))
        return False

    async def flush(self) -> None:
        """Returns when all writes have ended, or the disk hangs."""
        while await self.write_ends():
            pass

    async def _write(self, what: Entry | tuple[Description, bytes]) -> bool:
        try:
            written = await self._writer.to_its_end(_write, self.disk, what)
        except Exception as problem:
            if not self._closed:
                self._report("a write", problem)  # what is kept in RAM stays there
            written = False
        else:
            self._hangs = False
        if not written and not isinstance(what, Entry):
            self._noted.discard(what[0].key)  # the next keep tries again
        return written

    # ---- Reads ----------------------------------------------------------------------------------

    async def look_up(self, what: str, function: Callable[[Disk], T], failed: T) -> T:
        """Returns what a function finds on the disk; ``failed`` if the disk fails or hangs."""
        try:
            found = await self._lookups.call(function, self.disk)
        except KvferryError:
            raise  # the store is closed
        except Exception as problem:  # an index may have anything in it
            self._report(what, problem)
            return failed
        self._hangs = False
        return found

    @traced("read disk", part_told)
    async def read(
        self, description: Description, memory: memoryview, dropped: Callable[[], None]
    ) -> bool:
        """As ``Disk.read_into``, but returns False also if the disk fails.

        Raises Hanging. ``dropped`` is called when nothing writes into ``memory`` any more, unless
        this returns True.
        """
        try:
            right = await self._readers.call(
                lambda: self.disk.read_into(description, memory), dropped=dropped
            )
        except Hanging as problem:
            self._report("a read", problem)
            raise
        except KvferryError:
            raise  # the store is closed
        except Exception as problem:
            self._report("a read", problem)
            return False
        self._hangs = False
        if right:
            self.read_bytes += HEADER_BYTES + description.nbytes
        else:
            dropped()
        return right

    async def use(self, wanted: Iterable[Description]) -> set[Id]:
        """Returns which of these parts are on the disk, and notes their use. ``nbytes`` and
        ``checksum`` are not compared."""
        asked = list(wanted)
        if not asked:
            return set()

        def find(disk: Disk) -> set[Id]:
            found = set()
            for root in {each.root for each in asked}:
                disk.use("layout", root)  # a new process needs the note of the layout
            for each in asked:
                part = disk.find(each.kind, each.key)
                if part is not None and each == dataclasses.replace(
                    part, nbytes=each.nbytes, checksum=each.checksum
                ):
                    disk.use(each.kind, each.key)
                    found.add((each.kind, each.key))
            return found

        return await self.look_up("a search", find, set())

    @property
    def hangs(self) -> bool:
        """Whether a call hangs, and none has ended since."""
        return self._hangs

    async def quarantined(self, wanted: Iterable[Id]) -> list[Id]:
        """Returns which of these parts are in quarantine."""

        def find(disk: Disk) -> list[Id]:
            there = disk.quarantined()
            return [each for each in wanted if each in there]

        return await self.look_up("a search", find, [])

    async def layouts(self, model: bytes) -> dict[bytes, BlocksAllowed]:
        """Returns the roots under which something was kept for a model, and what they allow."""
        return await self.look_up("a search", lambda disk: _layouts(disk, model), {})

    def _report(self, what: str, problem: Exception) -> None:
        self.refused["hangs" if isinstance(problem, Hanging) else "failed"] += 1
        if isinstance(problem, Hanging):
            if not self._hangs:
                log.warning("%s hangs; it is not used until it answers", self._folder)
            self._hangs = True
            return
        unexpected = not isinstance(problem, (OSError, ValueError))
        log.warning("%s of %s failed: %s", what, self._folder, str(problem), exc_info=unexpected)


def _write(disk: Disk, what: Entry | tuple[Description, bytes]) -> bool:
    if not isinstance(what, Entry):
        description, data = what
        return disk.write(description, data)
    part = what.part
    return disk.write(dataclasses.replace(what.description, checksum=part.checksum), part.view)


def _layouts(disk: Disk, model: bytes) -> dict[bytes, BlocksAllowed]:
    return allowed_of(disk, disk.children(model))
