"""Finding the longest known prefix of a prompt, and loading it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import anyio

from .._bridge.llama_cpp_object import LlmState
from .._bridge.submission import Priority
from ..blocks import Block, Checkpoint
from ..errors import StateDamaged, StateMismatch
from ..llama import Llama
from .away import Away, Seen
from .behind import Behind
from .buffers import Buffers
from .description import Description
from .disk import Disk
from .identity import Identities
from .keys import Tokens
from .prefix import InBoth, InTurn, Lookup, Prefix, Search
from .ram import Entry, Ram
from .threads import Hanging

if TYPE_CHECKING:
    from .._native import CData

log = logging.getLogger("kvferry.store")

_SEARCHES = 8
"""How often a restore searches again, after a part could not be read."""


class _NotRead(Exception):
    """A part is not in RAM, and could not be read. Another search may find a shorter prefix."""


class _NoRoom(Exception):
    """There is no room in RAM for a part that is on the disk, or the disk hangs."""


class Restoring:
    """What ``Store.find``, ``Store.restore`` and ``Store.prefetch`` do."""

    def __init__(
        self,
        ram: Ram,
        behind: Behind | None,
        away: Away | None,
        buffers: Buffers,
        identities: Identities,
        block_tokens: int,
        counts: Counter[str],
    ) -> None:
        self._ram = ram
        self._behind = behind
        self._away = away
        self._buffers = buffers
        self._identities = identities
        self._block_tokens = block_tokens
        self._counts = counts

    async def prefixes(
        self, llama: Llama, tokens: Tokens, salt: bytes, *, ram_alone: bool = False
    ) -> list[Prefix]:
        """Returns the longest prefix of each cache that the context may have, longest first."""
        candidates = await self._identities.candidates(llama, salt)
        found = []
        for each in candidates:
            search = Search(self._ram, each.root, each.allowed, tokens, self._block_tokens)
            prefix = search.run()
            if not ram_alone:
                prefix = await self._search_farther(search, prefix)
            found.append(prefix)
        return sorted(filter(None, found), key=lambda prefix: prefix.end, reverse=True)

    async def _search_farther(self, search: Search, prefix: Prefix | None) -> Prefix | None:
        """Returns the longest prefix of all tiers. ``prefix`` is the longest one of RAM."""

        def whole() -> bool:
            return prefix is not None and prefix.end == len(search.tokens)

        if self._behind is not None and not whole():
            run = functools.partial(_search_in, search, self._ram, self._behind.disk)
            prefix = await self._behind.look_up("a search", run, prefix)
        if self._away is not None and not whole():
            seen = await self._away.look(search, prefix)
            without_disk = _search_in(search, self._ram, seen=seen)
            if self._behind is None:
                return without_disk
            run = functools.partial(_search_in, search, self._ram, self._behind.disk, seen)
            prefix = await self._behind.look_up("a search", run, without_disk or prefix)
        return prefix

    async def tier(self, prefix: Prefix) -> str:
        """Returns the farthest of the tiers that a prefix must be brought from."""
        missing = [p for p in prefix.parts if self._ram.get(p.kind, p.key) is None]
        if not missing:
            return "ram"
        if self._away is None:
            return "disk"
        on_disk = set() if self._behind is None else await self._behind.use(missing)
        return "disk" if len(on_disk) == len(missing) else "remote"

    async def restore(
        self, llama: Llama, seq: int, tokens: Tokens, salt: bytes, priority: Priority
    ) -> int:
        """Returns how many tokens were loaded; 0: none, and the sequence was not touched."""
        ram_alone = False
        for _ in range(_SEARCHES):
            again = False
            for prefix in await self.prefixes(llama, tokens, salt, ram_alone=ram_alone):
                with contextlib.ExitStack() as held:
                    try:
                        entries = await self.bring(llama, tokens, prefix, held)
                    except _NotRead:
                        again = True
                        continue
                    except _NoRoom:
                        again = ram_alone = True
                        continue
                    if await self._load(llama, seq, prefix, entries, priority):
                        self._ram.use(entries)
                        self._counts["restored_tokens"] += prefix.end
                        self._counts["restored_bytes"] += prefix.nbytes
                        return prefix.end
            if not again:
                break
        return 0

    async def prefetch(self, llama: Llama, tokens: Tokens, salt: bytes) -> None:
        """Brings the longest prefix of each cache to RAM."""
        for prefix in await self.prefixes(llama, tokens, salt):
            with contextlib.ExitStack() as held, contextlib.suppress(_NotRead, _NoRoom):
                await self.bring(llama, tokens, prefix, held)

    async def bring(
        self, llama: Llama, tokens: Tokens, prefix: Prefix, held: contextlib.ExitStack
    ) -> list[Entry]:
        """Returns what a load of a prefix needs, in RAM, where ``held`` keeps it.

        Raises _NotRead, _NoRoom, and as ``Buffers.take``.
        """
        entries: dict[int, Entry] = {}
        absent: list[Exception] = []
        problems: list[Exception] = []

        def hold(index: int, entry: Entry) -> None:
            entries[index] = entry
            held.enter_context(self._ram.held([entry]))

        missing = []
        for index, part in enumerate(prefix.parts):
            entry = self._ram.get(part.kind, part.key)
            # The search found it on the disk. If RAM still has it, after its time to live, it need
            # not be read.
            entry = entry or self._ram.renew(part.kind, part.key, None)
            if entry is None:
                missing.append(index)
            else:
                hold(index, entry)

        async def read(index: int) -> None:
            try:
                part = prefix.parts[index]
                hold(index, await self._read(llama, tokens, part, whole=not prefix.blocks))
            except (_NotRead, _NoRoom) as reason:
                absent.append(reason)  # other parts may be of use for a shorter prefix
            except Exception as problem:
                problems.append(problem)
                reads.cancel_scope.cancel()

        if missing:
            async with anyio.create_task_group() as reads:
                for index in missing:
                    reads.start_soon(read, index)
        for each in (*problems, *absent):
            raise each
        return [entries[index] for index in range(len(prefix.parts))]

    async def _read(self, llama: Llama, tokens: Tokens, part: Description, *, whole: bool) -> Entry:
        """Reads a part from a farther tier into a buffer of the engine, and keeps it in RAM."""
        if self._behind is None and self._away is None:
            raise _NotRead
        if (taken := await self._buffers.take(llama, part.nbytes)) is None:
            raise _NoRoom
        buffer, room = taken
        found = await self._fill(part, buffer.view, room.release)
        if found is None:
            raise _NotRead
        saved = _saved(found, buffer.memory, llama.fingerprint, tokens, whole)
        self._counts["read_bytes"] += part.nbytes
        return self._ram.add(Entry(found, saved, buffer.capacity), room)

    async def _fill(
        self, part: Description, memory: memoryview, dropped: Callable[[], None]
    ) -> Description | None:
        """Reads a part from the disk if it is there, else from the object store.

        Returns None where it was not read; raises _NoRoom. Then ``dropped`` is called when nothing
        writes into ``memory`` any more.
        """
        away = self._away
        if self._behind is not None and (away is None or await self._is_on_disk(part, dropped)):
            try:
                right = await self._behind.read(part, memory, dropped=dropped)
            except Hanging:
                raise _NoRoom from None
            return part if right else None
        assert away is not None
        return await away.read(part, memory, dropped)

    async def _is_on_disk(self, part: Description, dropped: Callable[[], None]) -> bool:
        assert self._behind is not None
        try:
            return bool(await self._behind.use([part]))
        except BaseException:
            dropped()
            raise

    async def _load(
        self,
        llama: Llama,
        seq: int,
        prefix: Prefix,
        entries: Sequence[Entry],
        priority: Priority,
    ) -> bool:
        """Returns False if the library has refused the prefix. The sequence is unchanged then."""
        blocks = [entry.part for entry in entries[: len(prefix.blocks)]]
        checkpoint = entries[-1].part if prefix.checkpoint else None
        was_unseen = await self._identities.is_unseen(llama)
        try:
            await llama.load_blocks(blocks, seq, checkpoint=checkpoint, priority=priority)  # type: ignore[arg-type]
        except (StateMismatch, StateDamaged) as refusal:
            self._counts["refused_loads"] += 1
            # For a context that has had no cells, refusals tell which layout its cache has.
            level = logging.DEBUG if was_unseen else logging.WARNING
            log.log(level, "a prefix of %d tokens was refused: %s", prefix.end, refusal)
            return False
        return True


def _search_in(
    search: Search, ram: Ram, disk: Disk | None = None, seen: Seen | None = None
) -> Prefix | None:
    """Searches RAM, the disk, and what was seen in the object store. May block on the disk."""
    lookup: Lookup = ram
    if disk is not None:
        lookup = InBoth(ram, disk, [link.key for link in search.links])
    if seen is not None:
        lookup = InTurn(lookup, seen)
    return dataclasses.replace(search, lookup=lookup, chained=search.links).run()


def _saved(
    part: Description, memory: CData, fingerprint: str, tokens: Tokens, whole: bool
) -> Block | Checkpoint:
    """Returns the Block or Checkpoint of a part that was read. ``whole``: it stands for all tokens
    before its end."""
    begin = 0 if whole else part.begin
    common = {
        "key": part.key,
        "fingerprint": fingerprint,
        "checksum": part.checksum,
        "llm": LlmState(tokens[begin : part.end].copy()),
    }
    if part.kind == "block":
        return Block(
            memory,
            part.nbytes,
            begin=part.begin,
            end=part.end,
            parent=part.parent,
            **common,  # type: ignore[arg-type]
        )
    return Checkpoint(memory, part.nbytes, position=part.end - 1, **common)  # type: ignore[arg-type]
