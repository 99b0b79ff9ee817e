"""The remote tier as a Store uses it: searches, reads, and writes behind."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING
from weakref import WeakSet

import anyio
import anyio.to_thread

from .._bridge.arguments import invalid
from .._bridge.block_list import BlocksAllowed
from .counts import Reason
from .description import Description, Kind
from .keys import Link, next_key
from .layout_notes import MOST_LAYOUTS
from .objects import Objects, objects_of
from .prefix import Prefix, Search
from .ram import Entry
from .remote import Calls, Remote
from .tracing import part_told, traced
from .writes import Writes

if TYPE_CHECKING:
    from obstore.store import ObjectStore

log = logging.getLogger("kvferry.store")

_WRITERS = 4
_FIRST_LOOK = 8
"""How many parts a search asks for at first. Each further question has four times as many."""
_NOTES_AT_A_TIME = 8
_ENDS = 16
"""How many ends behind one block a search asks for; the longest come first."""
_MOST_ENDS = 1024
_END = struct.Struct("<Q")
_LAYOUT = struct.Struct("<32s32s")


class Seen:
    """What a search has found in the object store: a Lookup of these parts."""

    def __init__(self, deadline: float) -> None:
        """``deadline`` is when the search ends, by the event loop's clock."""
        self.deadline = deadline
        self._parts: dict[tuple[Kind, bytes], Description] = {}
        self._ends: dict[bytes, list[int]] = {}

    def find(self, kind: Kind, key: bytes) -> Description | None:
        return self._parts.get((kind, key))

    def ends(self, parent: bytes) -> list[int]:
        return self._ends.get(parent, [])

    @property
    def seconds_left(self) -> float:
        return max(0.0, self.deadline - anyio.current_time())

    @property
    def has_checkpoint(self) -> bool:
        return any(kind == "checkpoint" for kind, _ in self._parts)

    def add(self, description: Description) -> None:
        self._parts[description.kind, description.key] = description

    def add_ends(self, parent: bytes, ends: list[int]) -> None:
        self._ends[parent] = ends


class Away:
    """A Remote, with tasks that write to it. For the thread of the event loop.

    An object store cannot list the parts that have a parent. So there are two kinds of notes.
    "ends" has the positions at which parts end that follow a block and are shorter than a block.
    "layouts" has the caches of a model for which something is kept.
    """

    def __init__(
        self, remote: str | ObjectStore | Objects, *, block_tokens: int, most_pending: int
    ) -> None:
        """``most_pending`` bounds the bytes of RAM that wait for being written.

        Raises InvalidArgument, ImportError.
        """
        try:
            objects = objects_of(remote)
        except ValueError as problem:
            raise invalid(str(problem)) from None
        self._name = remote if isinstance(remote, str) else "the remote tier"
        self.remote = Remote(objects, name=self._name)
        self._block_tokens = block_tokens
        self._most_pending = most_pending
        self.writes: Writes[tuple[bytes, bytes, BlocksAllowed]] = Writes(self._name, self._write)
        self._hashes = anyio.CapacityLimiter(_WRITERS)
        self._notes = anyio.Lock()
        self._there: WeakSet[Entry] = WeakSet()
        self._noted: set[tuple[bytes, bytes]] = set()
        self._refused = 0
        """Writes that were not tried: too much was waiting, or the circuit breaker was open."""

    async def open(self) -> None:
        self._tasks = await anyio.create_task_group().__aenter__()
        for _ in range(_WRITERS):
            self._tasks.start_soon(self.writes.run)

    async def close(self) -> None:
        """Ends writes that are under way: their uploads are aborted."""
        self.writes.close()
        self._tasks.cancel_scope.cancel()
        try:
            await self._tasks.__aexit__(None, None, None)
        finally:
            self.writes.drop()

    # ---- Writes ---------------------------------------------------------------------------------

    def write(self, entries: Iterable[Entry]) -> None:
        """Has entries of RAM written by a task, unless the object store has them."""
        for entry in entries:
            if entry in self._there or entry in self.writes:
                continue
            waiting = self.writes.pending_bytes + entry.capacity
            left_alone = self.remote.left_alone
            if left_alone or waiting > self._most_pending:
                reason: Reason = "breaker_open" if left_alone else "budget"
                self.remote.refused[reason] += 1
                self._refused += 1
            else:
                self.writes.add(entry)

    def note(self, model: bytes, root: bytes, allowed: BlocksAllowed) -> None:
        """Has a note written that something is kept under a root, unless that has been done."""
        if (model, root) not in self._noted and not self.remote.left_alone:
            self._noted.add((model, root))
            self.writes.add((model, root, allowed))

    async def flush(self) -> None:
        """Returns when all writes have ended."""
        while self.writes.pending:
            await self.writes.ended.wait()

    async def _write(self, what: Entry | tuple[bytes, bytes, BlocksAllowed]) -> bool:
        if not isinstance(what, Entry):
            written = await self._note_layout(*what)
            if not written:
                self._noted.discard(what[:2])
            return written
        part = what.part
        checksum = await anyio.to_thread.run_sync(getattr, part, "checksum", limiter=self._hashes)
        description = dataclasses.replace(what.description, checksum=checksum)
        calls = Calls()
        if not await self.remote.write(description, part.view, calls):
            await calls.ended()  # until then the entry must not be evicted: its memory is in use
            return False
        whole = description.end % self._block_tokens == 0
        if not whole and not await self._note_end(description.parent, description.end):
            return False
        self._there.add(what)
        return True

    async def _note_end(self, parent: bytes, end: int) -> bool:
        async with self._notes:
            ends = await self._ends(parent)
            if end in ends:
                return True
            content = b"".join(map(_END.pack, [*ends, end][-_MOST_ENDS:]))
            return await self.remote.write_note("ends", parent, content)

    async def _note_layout(self, model: bytes, root: bytes, allowed: BlocksAllowed) -> bool:
        async with self._notes:
            known = await self.layouts(model)
            if known.get(root) is allowed:
                return True
            known[root] = allowed
            records = [_LAYOUT.pack(key, each.value.encode()) for key, each in known.items()]
            content = b"".join(records[-MOST_LAYOUTS:])
            return await self.remote.write_note("layouts", model, content)

    # ---- Searches and reads ---------------------------------------------------------------------

    async def layouts(self, model: bytes) -> dict[bytes, BlocksAllowed]:
        """Returns the roots under which something was kept for a model, and what they allow."""
        content = await self.remote.note("layouts", model) or b""
        found = {}
        if len(content) % _LAYOUT.size == 0:
            for root, value in itertools.islice(_LAYOUT.iter_unpack(content), MOST_LAYOUTS):
                try:
                    found[root] = BlocksAllowed(value.rstrip(b"\0").decode())
                except ValueError as problem:
                    log.warning("an entry in a note of layouts is not used: %s", problem)
        return found

    def deadline(self) -> float:
        """When a search ends that begins now, by the event loop's clock."""
        return anyio.current_time() + self.remote.find_timeout

    async def look(self, search: Search, nearer: Prefix | None, deadline: float) -> Seen:
        """Asks the object store for a longer prefix than ``nearer``, which RAM and disk have.

        Returns at the deadline at the latest, with what was found by then.
        """
        seen = Seen(deadline)
        if not self.remote.left_alone:
            known = 0 if nearer is None else nearer.end // search.block_tokens
            await self._look(search, known, seen)
        return seen

    async def _look(self, search: Search, known: int, seen: Seen) -> None:
        links = search.links
        if search.allowed.blocks:
            begin, window = known, _FIRST_LOOK
            while begin < len(links) and seen.seconds_left:
                asked = links[begin : begin + window]
                count = await self._ask(search, [("block", link) for link in asked], seen)
                begin += count
                if count < len(asked):
                    break
                window *= 4
            links = links[:begin]
        # If the cache needs no checkpoints, only parts behind the last block make a longer prefix.
        least = known if search.allowed.checkpoints else len(links)
        for last in range(len(links), least - 1, -_NOTES_AT_A_TIME):
            async with anyio.create_task_group() as behind:
                for count in range(last, max(last - _NOTES_AT_A_TIME, least - 1), -1):
                    behind.start_soon(self._look_behind, search, links[:count], seen)
            if seen.has_checkpoint or not seen.seconds_left:
                break

    async def _look_behind(self, search: Search, before: Sequence[Link], seen: Seen) -> None:
        """Asks for the parts that end at the last of these blocks, or between it and the next."""
        parent = before[-1].key if before else search.root
        begin = len(before) * search.block_tokens
        asked: list[tuple[Kind, Link]] = []
        if before and search.allowed.checkpoints:
            asked.append(("checkpoint", before[-1]))
        most = min(len(search.tokens), begin + search.block_tokens - 1)
        ends = sorted(
            (end for end in await self._ends(parent, seen.seconds_left) if begin < end <= most),
            reverse=True,
        )
        for end in ends[:_ENDS]:
            link = Link(begin, end, next_key(parent, search.tokens[begin:end]), parent)
            if search.allowed.blocks:
                asked.append(("block", link))
            if search.allowed.checkpoints:
                asked.append(("checkpoint", link))
        seen.add_ends(parent, ends)
        if asked:
            await self._ask(search, asked, seen)

    async def _ask(self, search: Search, asked: Sequence[tuple[Kind, Link]], seen: Seen) -> int:
        """Adds the parts that are there to ``seen``. Returns how many come before the first one
        that is missing."""
        sizes = await self.remote.sizes(
            [(kind, link.key) for kind, link in asked], seconds=seen.seconds_left
        )
        for (kind, link), nbytes in zip(asked, sizes, strict=True):
            if nbytes:  # no part is empty
                begin = link.begin if kind == "block" else link.end
                seen.add(
                    Description(
                        kind, link.key, link.parent, begin, link.end, search.root, nbytes, 0
                    )
                )
        return next((n for n, size in enumerate(sizes) if size is None), len(sizes))

    async def _ends(self, parent: bytes, seconds: float | None = None) -> list[int]:
        content = await self.remote.note("ends", parent, seconds=seconds) or b""
        if len(content) % _END.size:
            return []
        return [end for (end,) in _END.iter_unpack(content)]

    @traced("read remote", part_told)
    async def read(
        self, part: Description, memory: memoryview, dropped: Callable[[], None]
    ) -> Description | None:
        """As ``Remote.read_into``. ``dropped`` is called when nothing writes into ``memory`` any
        more, unless this returns a description."""
        calls, found = Calls(), None
        try:
            found = await self.remote.read_into(part, memory, calls)
        finally:
            if found is None:
                self._tasks.start_soon(self._wait_for, calls, dropped)
        return found

    async def _wait_for(self, calls: Calls, dropped: Callable[[], None]) -> None:
        try:
            await calls.ended()
        finally:
            dropped()

    def stats(self) -> dict[str, int]:
        """Counters, for ``Store.stats``."""
        return {
            "remote_writes_pending": self.writes.pending,
            "remote_writes_failed": self.writes.failed + self._refused,
            "remote_written_bytes": self.remote.written_bytes,
            "remote_read_bytes": self.remote.read_bytes,
            "remote_calls_failed": self.remote.failed,
            "remote_times_left_alone": self.remote.opened,
        }
