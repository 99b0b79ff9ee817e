"""Finding the longest known prefix of a prompt, and loading it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio

from .._bridge.llama_cpp_object import LlmState
from .._bridge.submission import Priority
from ..blocks import Block, Checkpoint
from ..errors import StateDamaged, StateMismatch
from ..llama import Llama
from .away import Seen
from .description import Description
from .disk import Disk
from .identity import Identities, Kept
from .keys import Tokens
from .prefix import TIERS, InTurn, Lookup, OnDisk, Prefix, Search, Tier
from .ram import Entry, Ram
from .speeds import Stopwatch
from .threads import Hanging
from .tiers import Tiers
from .worth import Worth

if TYPE_CHECKING:
    from .._native import CData

log = logging.getLogger("kvferry.store")

_SEARCHES = 8
"""How often a restore searches again, after a part could not be read."""


@dataclass(frozen=True)
class Asked:
    """What a search looks for: a prefix of tokens, for a context and a salt."""

    llama: Llama
    tokens: Tokens
    salt: bytes


@dataclass(frozen=True)
class Searched(Asked):
    """What a search has found."""

    prefixes: list[Prefix]
    """The longest one of each cache that the context may have, longest first."""


class _NotRead(Exception):
    """A part is not in RAM, and could not be read. Another search may find a shorter prefix."""


class _NoRoom(Exception):
    """There is no room in RAM for a part that is on the disk, or the disk hangs."""


class _NotWorth(Exception):
    """To bring any part of a prefix takes longer than to evaluate its tokens."""


class Restoring:
    """What ``Store.find``, ``Store.restore`` and ``Store.prefetch`` do."""

    def __init__(self, tiers: Tiers, identities: Identities, worth: Worth) -> None:
        self._tiers = tiers
        self._identities = identities
        self._worth = worth

    async def search(self, asked: Asked, farthest: Tier = "remote") -> Searched:
        """Searches all tiers up to the farthest one that is named."""
        candidates = await self._identities.candidates(asked.llama, asked.salt)
        found = [await self.search_cache(asked, each, farthest) for each in candidates]
        longest_first = sorted(filter(None, found), key=lambda prefix: prefix.end, reverse=True)
        return Searched(asked.llama, asked.tokens, asked.salt, longest_first)

    async def search_cache(self, asked: Asked, kept: Kept, farthest: Tier) -> Prefix | None:
        """Returns the longest prefix that is kept for one cache, in tiers up to ``farthest``."""
        ram = InTurn({"ram": self._tiers.ram})
        block_tokens = self._tiers.block_tokens
        search = Search(ram, kept.root, kept.allowed, asked.tokens, block_tokens)
        return await self._search_farther(search, search.run(), farthest)

    async def _search_farther(
        self, search: Search, prefix: Prefix | None, farthest: Tier
    ) -> Prefix | None:
        """Returns the longest prefix of these tiers. ``prefix`` is the longest one of RAM."""
        ram = self._tiers.ram
        behind = self._tiers.behind if farthest != "ram" else None
        away = self._tiers.away if farthest == "remote" else None

        def whole() -> bool:
            return prefix is not None and prefix.end == len(search.tokens)

        if behind is not None and not whole():
            run = functools.partial(_search_in, search, ram, behind.disk)
            prefix = await behind.look_up("a search", run, prefix)
        if away is not None and not whole():
            seen = await away.look(search, prefix)
            without_disk = _search_in(search, ram, seen=seen)
            if behind is None:
                return without_disk
            run = functools.partial(_search_in, search, ram, behind.disk, seen)
            prefix = await behind.look_up("a search", run, without_disk or prefix)
        return prefix

    async def restore(
        self, asked: Asked, seq: int, held: int, priority: Priority, searched: Searched | None
    ) -> int:
        """Returns how many tokens were loaded; 0: none, and the sequence was not touched.

        ``held`` is how many of the tokens the sequence holds already: nothing shorter is loaded,
        and nothing that is not worth it. ``searched`` is the search to begin with.
        """
        farthest: Tier = "remote"
        for _ in range(_SEARCHES):
            if searched is None:
                searched = await self.search(asked, farthest)
            again: list[Tier] = []
            for prefix in searched.prefixes:
                if prefix.end <= held:
                    continue
                try:
                    if count := await self._restore(asked, seq, prefix, held, priority):
                        return count
                except _NotRead:
                    again.append(farthest)
                except _NoRoom:
                    again.append("ram")
                except _NotWorth:
                    if prefix.checkpoint and prefix.farthest != "ram":
                        # A shorter prefix with a checkpoint at its end may lie nearer.
                        again.append(TIERS[TIERS.index(prefix.farthest) - 1])
            if not again:
                break
            farthest, searched = min(again, key=TIERS.index), None
        return 0

    async def _restore(
        self, asked: Asked, seq: int, prefix: Prefix, held: int, priority: Priority
    ) -> int:
        """Returns how many tokens of a prefix were loaded; 0 if the library has refused it.

        Raises _NotWorth, and as ``bring``.
        """
        choice = self._worth.choose(asked.llama, prefix, held)
        if (chosen := choice.prefix) is None:
            raise _NotWorth
        for speed in choice.trials:
            speed.begin_trial()
        with contextlib.ExitStack() as held_in_ram:
            entries = await self.bring(asked, chosen, held_in_ram)
            if not await self._load(asked.llama, seq, chosen, entries, priority):
                return 0
            self._tiers.ram.use(entries)
        self._tiers.counts["restored_tokens"] += chosen.end
        self._tiers.counts["restored_bytes"] += chosen.nbytes
        return chosen.end

    async def prefetch(self, asked: Asked) -> None:
        """Brings the longest prefix of each cache to RAM."""
        for prefix in (await self.search(asked)).prefixes:
            with contextlib.ExitStack() as held, contextlib.suppress(_NotRead, _NoRoom):
                await self.bring(asked, prefix, held)

    async def bring(self, asked: Asked, prefix: Prefix, held: contextlib.ExitStack) -> list[Entry]:
        """Returns what a load of a prefix needs, in RAM, where ``held`` keeps it.

        Raises _NotRead, _NoRoom, and as ``Buffers.take``.
        """
        entries: dict[int, Entry] = {}
        absent: list[Exception] = []
        problems: list[Exception] = []
        watches = self._worth.stopwatches()

        def hold(index: int, entry: Entry) -> None:
            entries[index] = entry
            held.enter_context(self._tiers.ram.held([entry]))

        missing = []
        for index, part in enumerate(prefix.parts):
            entry = self._tiers.ram.get(part.kind, part.key)
            # The search found it on the disk. If RAM still has it, after its time to live, it need
            # not be read.
            entry = entry or self._tiers.ram.renew(part.kind, part.key, None)
            if entry is None:
                missing.append(index)
            else:
                hold(index, entry)

        async def read(index: int) -> None:
            try:
                part = prefix.parts[index]
                tier = prefix.tiers[index]
                whole = not prefix.blocks
                hold(index, await self._read(asked, part, tier, watches, whole=whole))
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
        self._worth.note_reads(watches)
        return [entries[index] for index in range(len(prefix.parts))]

    async def _read(
        self,
        asked: Asked,
        part: Description,
        tier: Tier,
        watches: Mapping[Tier, Stopwatch],
        *,
        whole: bool,
    ) -> Entry:
        """Reads a part from a farther tier into a buffer of the engine, and keeps it in RAM."""
        if tier == "ram":
            raise _NotRead  # it has been evicted since the search
        if (taken := await self._tiers.buffers.take(asked.llama, part.nbytes)) is None:
            raise _NoRoom
        buffer, room = taken
        with watches[tier].reading():
            found = await self._fill(part, tier, buffer.view, room.release)
        if found is None:
            raise _NotRead
        watches[tier].nbytes += part.nbytes
        saved = _saved(found, buffer.memory, asked.llama.fingerprint, asked.tokens, whole)
        self._tiers.counts["read_bytes"] += part.nbytes
        return self._tiers.ram.add(Entry(found, saved, buffer.capacity), room)

    async def _fill(
        self, part: Description, tier: Tier, memory: memoryview, dropped: Callable[[], None]
    ) -> Description | None:
        """Reads a part from the disk or the object store.

        Returns None where it was not read; raises _NoRoom. Then ``dropped`` is called when nothing
        writes into ``memory`` any more.
        """
        if tier == "remote":
            assert self._tiers.away is not None
            return await self._tiers.away.read(part, memory, dropped)
        assert self._tiers.behind is not None
        try:
            right = await self._tiers.behind.read(part, memory, dropped=dropped)
        except Hanging:
            raise _NoRoom from None
        return part if right else None

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
        begin = self._worth.clock()
        try:
            await llama.load_blocks(blocks, seq, checkpoint=checkpoint, priority=priority)  # type: ignore[arg-type]
        except (StateMismatch, StateDamaged) as refusal:
            self._tiers.counts["refused_loads"] += 1
            # For a context that has had no cells, refusals tell which layout its cache has.
            level = logging.DEBUG if was_unseen else logging.WARNING
            log.log(level, "a prefix of %d tokens was refused: %s", prefix.end, refusal)
            return False
        self._worth.load(llama).note(prefix.nbytes, self._worth.clock() - begin)
        return True


def _search_in(
    search: Search, ram: Ram, disk: Disk | None = None, seen: Seen | None = None
) -> Prefix | None:
    """Searches RAM, the disk, and what was seen in the object store. May block on the disk."""
    tiers: dict[Tier, Lookup] = {"ram": ram}
    if disk is not None:
        tiers["disk"] = OnDisk(disk, [link.key for link in search.links])
    if seen is not None:
        tiers["remote"] = seen
    return dataclasses.replace(search, lookup=InTurn(tiers), chained=search.links).run()


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
