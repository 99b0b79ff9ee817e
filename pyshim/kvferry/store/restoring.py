"""Finding the longest known prefix of a prompt, and loading it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from collections import Counter
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
from .tracing import part_told, traced
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

    @traced("find")
    async def search(self, asked: Asked, farthest: Tier = "remote") -> Searched:
        """Searches all tiers up to the farthest one that is named."""
        candidates = await self._identities.candidates(asked.llama, asked.salt)
        away = self._tiers.away
        deadline = None if away is None else away.deadline()  # of all together
        found = [await self.search_cache(asked, each, farthest, deadline) for each in candidates]
        longest_first = sorted(filter(None, found), key=lambda prefix: prefix.end, reverse=True)
        return Searched(asked.llama, asked.tokens, asked.salt, longest_first)

    async def search_cache(
        self, asked: Asked, kept: Kept, farthest: Tier, deadline: float | None = None
    ) -> Prefix | None:
        """Returns the longest prefix that is kept for one cache, in tiers up to ``farthest``. The
        object store is asked until the deadline; by default, for as long as a search may take."""
        ram = InTurn({"ram": self._tiers.ram})
        block_tokens = self._tiers.block_tokens
        search = Search(ram, kept.root, kept.allowed, asked.tokens, block_tokens)
        return await self._search_farther(search, search.run(), farthest, deadline)

    async def _search_farther(
        self, search: Search, prefix: Prefix | None, farthest: Tier, deadline: float | None
    ) -> Prefix | None:
        """Returns the longest prefix of these tiers. ``prefix`` is the longest one of RAM."""
        ram = self._tiers.ram
        behind = self._tiers.behind if farthest != "ram" else None
        away = self._tiers.away if farthest == "remote" else None

        def whole() -> bool:
            return prefix is not None and prefix.end == len(search.tokens)

        if behind is not None and not whole():
            run = functools.partial(_search_in, search, ram)
            prefix = await behind.look_up("a search", run, prefix)
        if away is not None and not whole():
            seen = await away.look(search, prefix, deadline or away.deadline())
            without_disk = _search_in(search, ram, seen=seen)
            if behind is None:
                return without_disk
            run = functools.partial(_search_in, search, ram, seen=seen)
            prefix = await behind.look_up("a search", run, without_disk or prefix)
        return prefix

    async def restore(
        self, asked: Asked, seq: int, held: int, priority: Priority, searched: Searched | None
    ) -> int:
        """Returns how many tokens were loaded; 0: none, and the sequence was not touched.

        ``held`` is how many of the tokens the sequence holds already: nothing shorter is loaded,
        and nothing that is not worth it. ``searched`` is the search to begin with.
        """
        begin = time.monotonic()
        loaded = await self._restore_longest(asked, seq, held, priority, searched)
        hits = Counter[Tier]() if loaded is None else _hits(loaded, held)
        wanted = max(0, len(asked.tokens) - held)
        self._tiers.counts.restored(wanted, hits, time.monotonic() - begin)
        return 0 if loaded is None else loaded.end

    async def _restore_longest(
        self, asked: Asked, seq: int, held: int, priority: Priority, searched: Searched | None
    ) -> Prefix | None:
        """Returns what was loaded."""
        farthest: Tier = "remote"
        for _ in range(_SEARCHES):
            if searched is None:
                searched = await self.search(asked, farthest)
            again: list[Tier] = []
            for prefix in searched.prefixes:
                if prefix.end <= held:
                    continue
                try:
                    if loaded := await self._restore(asked, seq, prefix, held, priority):
                        return loaded
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
        return None

    async def _restore(
        self, asked: Asked, seq: int, prefix: Prefix, held: int, priority: Priority
    ) -> Prefix | None:
        """Returns the part of a prefix that was loaded; None if the library has refused it.

        Raises _NotWorth, and as ``bring``.
        """
        choice = self._worth.choose(asked.llama, prefix, held)
        if choice.prefix != prefix:
            self._tiers.counts.slow[prefix.farthest] += 1
        if (chosen := choice.prefix) is None:
            raise _NotWorth
        for speed in choice.trials:
            speed.begin_trial()
        with contextlib.ExitStack() as held_in_ram:
            entries = await self.bring(asked, chosen, held_in_ram)
            if not await self._load(asked.llama, seq, chosen, entries, priority):
                return None
            self._tiers.ram.use(entries)
        self._tiers.counts.restored_tokens += chosen.end
        self._tiers.counts.restored_bytes += chosen.nbytes
        return chosen

    async def prefetch(self, asked: Asked) -> None:
        """Brings the longest prefix of each cache to RAM."""
        for prefix in (await self.search(asked)).prefixes:
            with contextlib.ExitStack() as held, contextlib.suppress(_NotRead, _NoRoom):
                await self.bring(asked, prefix, held)

    @traced("bring", lambda _self, _asked, prefix, _held: {"tokens": prefix.end})
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
            if entry is None and prefix.tiers[index] != "ram":
                # The search found it in a farther tier. If RAM still has it, after its time to
                # live, it need not be read.
                entry = self._tiers.ram.renew(part.kind, part.key, None)
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
        # No variable keeps the exception: its traceback refers to the frames that have the buffers.
        failure = next(iter((*problems, *absent)), None)
        problems.clear()
        absent.clear()
        if failure is not None:
            try:
                raise failure
            finally:
                del failure
        self._worth.note_reads(watches)
        return [entries[index] for index in range(len(prefix.parts))]

    @traced("part", part_told, apart=True)
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
        view = buffer.view

        def dropped() -> None:
            # The memory first: frames and threads may refer to the view for some time yet.
            view.release()
            buffer.close()
            room.release()

        with watches[tier].reading():
            found = await self._fill(part, tier, view, dropped)
        if found is None:
            raise _NotRead
        watches[tier].nbytes += part.nbytes
        saved = _saved(found, buffer.memory, asked.llama.fingerprint, asked.tokens, whole)
        self._tiers.counts.read_bytes += part.nbytes
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

    @traced(
        "load",
        lambda _self, _llama, _seq, prefix, *_: {"tokens": prefix.end, "bytes": prefix.nbytes},
    )
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
            self._tiers.counts.refused_loads += 1
            # For a context that has had no cells, refusals tell which layout its cache has.
            level = logging.DEBUG if was_unseen else logging.WARNING
            if not was_unseen:
                is_damaged = isinstance(refusal, StateDamaged)
                self._tiers.ram.refused["damaged" if is_damaged else "foreign"] += 1
            log.log(level, "a prefix of %d tokens was refused: %s", prefix.end, refusal)
            return False
        self._worth.load(llama).note(prefix.nbytes, self._worth.clock() - begin)
        return True


def _hits(prefix: Prefix, held: int) -> Counter[Tier]:
    """Returns how many tokens of a prefix, from ``held`` on, each tier has."""
    hits: Counter[Tier] = Counter()
    for part, tier in zip(prefix.parts, prefix.tiers, strict=True):
        begin = part.begin if prefix.blocks else 0  # a checkpoint alone stands for all tokens
        hits[tier] += max(0, part.end - max(begin, held))
    return hits


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
