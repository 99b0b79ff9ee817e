"""The store: what is kept of conversations, and found again by their tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

import anyio
from numpy.typing import ArrayLike

from .._bridge.arguments import integer, invalid
from .._bridge.block_list import BlocksAllowed
from .._bridge.llama_cpp_object import LlmState
from .._bridge.submission import Priority
from .._native import lib
from ..blocks import Block, Checkpoint
from ..errors import KvferryError, StateDamaged, StateMismatch, error
from ..llama import Llama
from .behind import Behind
from .description import Description
from .identity import Identities, Kept
from .keys import Link, Tokens, chain, checked_tokens
from .prefix import InBoth, Prefix, Search
from .ram import Entry, Ram
from .sizes import size

log = logging.getLogger("kvferry.store")

_POOL_ROUNDING = 1 << 16
"""A buffer of the pool may have so many bytes more than it was asked for, and more by a sixteenth:
``Llama.save_checkpoint`` asks for that much."""


_SEARCHES = 8
"""How often a restore searches again, after a file that cannot be used was put aside."""


@dataclass(frozen=True)
class Found:
    """What ``Store.find`` has found."""

    tokens: int
    """How many of the first tokens are kept; 0 if none are."""
    nbytes: int
    """The bytes that a restore would move."""
    tier: str
    """Where they lie: "ram"; "disk", where some of them are on disk alone; "" where
    nothing is kept."""


@dataclass(frozen=True)
class Listed:
    """A conversation that was kept under a name."""

    name: str
    tokens: int
    nbytes: int
    """The bytes of it that are still there. Others may share them."""
    pinned: bool


@dataclass
class _Named:
    tokens: int
    entries: list[Entry]
    pinned: bool


class Store:
    """Keeps the KV cache of conversations, and finds the longest known prefix of a prompt.

    Use it as ``async with kvferry.Store(ram="8 GiB") as store: ...``. A store serves several
    engines, contexts and models. All methods are for the thread of one event loop, and may be
    called by several tasks at a time.

    ram
        The most bytes that the buffers of all that is kept may take: an int, or a string such as
        "8 GiB". Buffers that are being filled count.
    disk
        A folder, which several processes may share. What is kept is written there behind, and found
        again when the process has been started anew.
    disk_limit
        The most bytes that the folder may take. Given with ``disk``.
    block_tokens
        How many tokens a block has. Only what was kept with this number is found.
    salt
        Names the owner of what is kept. It is hashed into every key, so that nothing is found that
        was kept with another salt. Methods have an argument of this name for stores that serve
        several owners.
    """

    def __init__(
        self,
        *,
        ram: int | str,
        disk: str | os.PathLike[str] | None = None,
        disk_limit: int | str | None = None,
        block_tokens: int = 256,
        salt: bytes = b"",
    ) -> None:
        """Raises TypeError, InvalidArgument."""
        self._behind: Behind | None = None
        if (disk is None) != (disk_limit is None):
            raise invalid("disk and disk_limit are given both or neither")
        if disk is not None:
            self._behind = Behind(disk, size("disk_limit", disk_limit))
        self._ram = Ram(size("ram", ram))
        self._block_tokens = integer("block_tokens", block_tokens, least=1)
        self._salt = _checked_salt(salt)
        self._identities = Identities(anyio.CapacityLimiter(1), self._behind)
        self._names: dict[str, _Named] = {}
        self._counts: Counter[str] = Counter()
        self._closed = True  # until it is entered

    # ---- Finding and restoring ------------------------------------------------------------------

    async def find(
        self, llama: Llama, tokens: ArrayLike, *, leave: int = 1, salt: bytes | None = None
    ) -> Found:
        """Returns what ``restore`` with the same arguments would bring.

        For a context that has never had a cell, several caches are possible: the longest prefix of
        all of them is told, and ``restore`` may find that it does not fit.
        """
        prefixes = await self._prefixes(llama, self._part(tokens, leave), salt)
        if not prefixes:
            return Found(0, 0, "")
        in_ram = all(self._ram.get(part.kind, part.key) for part in prefixes[0].parts)
        return Found(prefixes[0].end, prefixes[0].nbytes, "ram" if in_ram else "disk")

    async def restore(
        self,
        llama: Llama,
        seq: int,
        tokens: ArrayLike,
        *,
        leave: int = 1,
        salt: bytes | None = None,
        priority: Priority = "urgent",
    ) -> int:
        """Loads the longest known prefix into a sequence, in place of what the sequence held.

        Returns how many tokens the sequence holds then: the program decodes ``tokens`` from there
        on. Where nothing is known the sequence is emptied, and this returns 0.

        ``leave`` is how many tokens at the end are not restored, even if they are known. A state
        has no logits, so that at least one token must be decoded before the next one is sampled.

        If the task is cancelled, or this raises, ``llama.load_outcome(seq)`` tells what the
        sequence holds. Raises CacheFull, SequenceRange, EngineClosed, ContextFreed, Busy (a
        transfer of the sequence is in flight), and KvferryError (the store is closed).
        """
        wanted = self._part(tokens, leave)
        for _ in range(_SEARCHES):
            unreadable = False
            for prefix in await self._prefixes(llama, wanted, salt):
                with contextlib.ExitStack() as held:
                    entries = await self._bring(llama, wanted, prefix, held)
                    unreadable |= entries is None
                    if entries and await self._load(llama, seq, prefix, entries, priority):
                        self._ram.use(entries)
                        self._counts["restored_tokens"] += prefix.end
                        self._counts["restored_bytes"] += prefix.nbytes
                        return prefix.end
            if not unreadable:
                break  # else the disk knows better now what it has
        await llama.remove(seq)
        return 0

    def prefetch(self, llama: Llama, tokens: ArrayLike, *, salt: bytes | None = None) -> None:
        """Reads the longest known prefix from the disk into RAM, in a task of the store. Returns at
        once."""
        self._check_open()
        self._tasks.start_soon(self._prefetch, llama, checked_tokens(tokens), salt)

    async def _prefetch(self, llama: Llama, tokens: Tokens, salt: bytes | None) -> None:
        try:
            for prefix in await self._prefixes(llama, tokens, salt):
                with contextlib.ExitStack() as held:
                    await self._bring(llama, tokens, prefix, held)
        except (KvferryError, OSError) as problem:
            log.warning("a prefix was not brought to RAM ahead: %s", problem)

    async def _bring(
        self, llama: Llama, tokens: Tokens, prefix: Prefix, held: contextlib.ExitStack
    ) -> list[Entry] | None:
        """Returns what a load needs, in RAM, where ``held`` keeps it. None: a part cannot be read,
        or there is no room."""
        entries: list[Entry | None] = []
        missing = []
        for index, part in enumerate(prefix.parts):
            entry = self._ram.get(part.kind, part.key)
            entries.append(entry)
            if entry is None:
                missing.append(index)
            else:
                held.enter_context(self._ram.held([entry]))
        whole = not prefix.blocks

        async def read(index: int) -> None:
            part = prefix.parts[index]
            entries[index] = entry = await self._read(llama, tokens, part, whole)
            if entry is not None:
                held.enter_context(self._ram.held([entry]))

        async with anyio.create_task_group() as reads:
            for index in missing:
                reads.start_soon(read, index)
        there = [entry for entry in entries if entry is not None]
        return there if len(there) == len(entries) else None

    async def _read(
        self, llama: Llama, tokens: Tokens, part: Description, whole: bool
    ) -> Entry | None:
        """Reads a part from the disk into a buffer of the engine, and keeps it in RAM."""
        if self._behind is None:
            return None
        room = part.nbytes + _POOL_ROUNDING
        if not await self._reserve(room):
            return None
        try:
            buffer = await llama.allocate(part.nbytes)
            if not await self._behind.read(part, buffer.view):
                return None
        finally:
            self._ram.unreserve(room)
        begin = 0 if whole else part.begin
        saved = {
            "key": part.key,
            "fingerprint": llama.fingerprint,
            "checksum": part.checksum,
            "llm": LlmState(tokens[begin : part.end].copy()),
        }
        read: Block | Checkpoint
        if part.kind == "block":
            read = Block(
                buffer.memory,
                part.nbytes,
                begin=part.begin,
                end=part.end,
                parent=part.parent,
                **saved,  # type: ignore[arg-type]
            )
        else:
            read = Checkpoint(buffer.memory, part.nbytes, position=part.end - 1, **saved)  # type: ignore[arg-type]
        entry = Entry(part, read, buffer.capacity)
        self._counts["read_bytes"] += part.nbytes
        return entry if self._ram.add(entry) else self._ram.get(part.kind, part.key)

    async def _reserve(self, nbytes: int) -> bool:
        """As ``Ram.reserve``, but waits for writes to the disk, which keep entries in RAM."""
        while not self._ram.reserve(nbytes):
            if self._behind is None or not self._behind.pending or nbytes > self._ram.limit:
                return False
            await self._behind.wait_for_a_write()
        return True

    async def _load(
        self,
        llama: Llama,
        seq: int,
        prefix: Prefix,
        entries: Sequence[Entry],
        priority: Priority,
    ) -> bool:
        """False: the library has refused it, before it touched the sequence."""
        blocks = [entry.part for entry in entries[: len(prefix.blocks)]]
        checkpoint = entries[-1].part if prefix.checkpoint else None
        was_unseen = await self._identities.is_unseen(llama)
        try:
            await llama.load_blocks(blocks, seq, checkpoint=checkpoint, priority=priority)  # type: ignore[arg-type]
        except (StateMismatch, StateDamaged) as refusal:
            self._counts["refused_loads"] += 1
            # Of a new context that is how the layout of the cache is found out.
            level = logging.DEBUG if was_unseen else logging.WARNING
            log.log(level, "a prefix of %d tokens was refused: %s", prefix.end, refusal)
            return False
        return True

    async def _prefixes(self, llama: Llama, tokens: Tokens, salt: bytes | None) -> list[Prefix]:
        """The longest prefix of each cache that the context may have, longest first."""
        self._check_open()
        candidates = await self._identities.candidates(llama, self._salt_or(salt))
        found = []
        for each in candidates:
            search = Search(self._ram, each.root, each.allowed, tokens, self._block_tokens)
            prefix = search.run()
            if self._behind is not None and (prefix is None or prefix.end < len(tokens)):
                both = InBoth(self._ram, self._behind.disk)
                try:
                    prefix = await self._behind.call(dataclasses.replace(search, lookup=both).run)
                except OSError as problem:
                    log.warning("the disk was not searched: %s", problem)
            found.append(prefix)
        return sorted(filter(None, found), key=lambda prefix: prefix.end, reverse=True)

    # ---- Keeping --------------------------------------------------------------------------------

    async def keep(
        self,
        llama: Llama,
        seq: int,
        tokens: ArrayLike,
        *,
        salt: bytes | None = None,
        name: str | None = None,
        ttl: float | None = None,
        priority: Priority = "background",
    ) -> int:
        """Keeps what the sequence holds of these tokens, which stand at its positions from 0 on.

        Only what is not in RAM already is saved. The sequence may be decoded further meanwhile, but
        where the cache needs checkpoints it must end with ``tokens`` when this is called, and until
        the context's thread has taken the checkpoint.

        Returns how many of the tokens are kept then: fewer than ``tokens`` has where the budget has
        no room for all. ``name`` is for ``pin``, ``evict`` and ``list``; an older conversation
        of this name loses it. ``ttl`` is a time in seconds after which it is not found any more;
        what is shared is kept as long as the longest of those who keep it ask. Both are for RAM.

        If the task is cancelled, the save is cancelled, and nothing more is kept.

        Raises InvalidArgument (the sequence does not hold the tokens at these positions),
        SequenceEmpty, SequenceRange, PinnedLimit, EngineClosed, ContextFreed, KvferryError (the
        cache allows neither blocks nor checkpoints; the store is closed), and Busy (a load into the
        sequence is in flight).
        """
        self._check_open()
        tokens = checked_tokens(tokens)
        expires = None if ttl is None else time.monotonic() + ttl
        kept, why = await self._identities.to_keep(llama, self._salt_or(salt))
        if kept.allowed is BlocksAllowed.UNSEEN:
            raise error(lib.KVF_ERR_SEQUENCE_EMPTY, why)
        if kept.allowed is BlocksAllowed.NONE:
            raise error(lib.KVF_ERR_UNSUPPORTED, why)
        links = chain(kept.root, tokens, self._block_tokens)
        if not links:
            return 0
        entries: list[Entry] = []
        for link in links if kept.allowed.blocks else ():
            # Later blocks may be there without this one, after a file was lost.
            if (entry := self._ram.renew("block", link.key, expires)) is None:
                break
            entries.append(entry)
        with self._ram.held(entries):
            end = await self._save(llama, seq, tokens, kept, links, len(entries), expires, priority)
        self._counts["kept_tokens"] += end
        if name is not None:
            self._name(name, kept, links, end)
        return end

    async def _save(
        self,
        llama: Llama,
        seq: int,
        tokens: Tokens,
        kept: Kept,
        links: Sequence[Link],
        known: int,
        expires: float | None,
        priority: Priority,
    ) -> int:
        """Saves what is missing of a chain of which the first ``known`` blocks are there."""
        last = links[-1]
        reserved = 0
        parts: list[tuple[Link, Block | Checkpoint]] = []
        try:
            if kept.allowed.checkpoints and not self._ram.renew("checkpoint", last.key, expires):
                nbytes = await llama.checkpoint_size_async(seq)
                room = nbytes + nbytes // 16 + 2 * _POOL_ROUNDING
                if not await self._reserve(room):
                    return self._kept_end(links, kept)
                reserved += room
                checkpoint = await llama.save_checkpoint(seq, key=last.key, priority=priority)
                parts.append((last, checkpoint))
                if checkpoint.position != last.end - 1:
                    raise invalid(
                        f"the sequence ends with position {checkpoint.position}, not {last.end - 1}"
                    )
                if not kept.allowed.blocks:
                    checkpoint.llm = LlmState(tokens.copy())
            if kept.allowed.blocks and known < len(links):
                missing = []
                for link in links[known:]:
                    nbytes = await llama.block_size_async(link.end - link.begin)
                    room = nbytes + _POOL_ROUNDING
                    if not await self._reserve(room):
                        break
                    reserved += room
                    missing.append((link, nbytes))
                if missing:
                    parts += await self._save_blocks(llama, seq, tokens, missing, priority)
        except BaseException:
            for _, part in parts:
                part.close()
            raise
        finally:
            self._ram.unreserve(reserved)
        self._add(kept, parts, expires)
        return self._kept_end(links, kept)

    async def _save_blocks(
        self,
        llama: Llama,
        seq: int,
        tokens: Tokens,
        missing: Sequence[tuple[Link, int]],
        priority: Priority,
    ) -> list[tuple[Link, Block]]:
        first, last = missing[0][0], missing[-1][0]
        blocks = await llama.save_blocks(
            seq,
            first.begin,
            last.end,
            tokens=self._block_tokens,
            keys=[link.key for link, _ in missing],
            parent=first.parent,
            priority=priority,
        )
        saved = []
        for (link, nbytes), block in zip(missing, blocks, strict=True):
            if block.nbytes != nbytes:
                for each in blocks:
                    each.close()
                raise invalid(
                    f"the sequence has not one token at each position from {link.begin} to "
                    f"{link.end - 1}"
                )
            block.llm = LlmState(tokens[link.begin : link.end].copy())
            saved.append((link, block))
        return saved

    def _add(
        self, kept: Kept, parts: Sequence[tuple[Link, Block | Checkpoint]], expires: float | None
    ) -> None:
        """Blocks that follow others come first: so they are the first that are evicted."""
        for link, part in sorted(parts, key=lambda one: one[0].end, reverse=True):
            is_block = isinstance(part, Block)
            description = Description(
                kind="block" if is_block else "checkpoint",
                key=link.key,
                parent=link.parent,
                begin=link.begin if is_block else link.end,
                end=link.end,
                root=kept.root,
                nbytes=part.nbytes,
                checksum=0,
            )
            entry = Entry(description, part, part.capacity, expires=expires)
            if self._ram.add(entry):
                self._counts["saved_bytes"] += part.nbytes
                if self._behind is not None:
                    self._behind.write(entry)

    def _kept_end(self, links: Sequence[Link], kept: Kept) -> int:
        """How many tokens of a chain can be restored, up to its last link."""
        if kept.allowed.checkpoints:
            whole = self._ram.get("checkpoint", links[-1].key) is not None
            if not whole or not kept.allowed.blocks:
                return links[-1].end if whole else 0
        end = 0
        for link in links:
            if self._ram.get("block", link.key) is None:
                return 0 if kept.allowed.checkpoints else end
            end = link.end
        return end

    # ---- What is kept ---------------------------------------------------------------------------

    def _name(self, name: str, kept: Kept, links: Sequence[Link], end: int) -> None:
        ids = [("block", link.key) for link in links if link.end <= end]
        ids.append(("checkpoint", links[-1].key))
        entries = [entry for each in ids if (entry := self._ram.get(*each))]  # type: ignore[arg-type]
        was_pinned = name in self._names and self._names[name].pinned
        if was_pinned:
            self.unpin(name)
        self._names[name] = _Named(end, entries, False)
        if was_pinned:
            self.pin(name)

    def pin(self, name: str) -> None:
        """Keeps what has this name from being evicted. Raises KeyError."""
        named = self._names[name]
        if not named.pinned:
            named.pinned = True
            for entry in named.entries:
                entry.holds += 1

    def unpin(self, name: str) -> None:
        """Ends ``pin``. Raises KeyError."""
        named = self._names[name]
        if named.pinned:
            named.pinned = False
            for entry in named.entries:
                entry.holds -= 1

    def evict(self, name: str) -> int:
        """Removes from RAM what has this name, and its pin.

        What others share, or a restore uses now, stays. Returns how many blocks and
        checkpoints were removed. Raises KeyError.
        """
        self.unpin(name)
        return self._ram.remove_all(self._names.pop(name).entries)

    def clear(self) -> int:
        """Removes everything from RAM, except what a restore or a keep uses now.

        Returns as ``evict``.
        """
        for name in list(self._names):
            self.unpin(name)
        self._names.clear()
        return self._ram.remove_all(self._ram)

    def list(self) -> list[Listed]:
        """Returns the conversations that have a name."""
        return [
            Listed(
                name,
                named.tokens,
                sum(each.description.nbytes for each in named.entries if self._ram.has(each)),
                named.pinned,
            )
            for name, named in self._names.items()
        ]

    def stats(self) -> dict[str, int]:
        """Returns counters since the store was made, and what it holds now."""
        return {
            "ram_limit": self._ram.limit,
            "ram_used": self._ram.used,
            "ram_reserved": self._ram.reserved,
            "ram_entries": len(self._ram),
            "evicted": self._ram.evicted,
            "disk_writes_pending": self._behind.pending if self._behind else 0,
            "disk_writes_failed": self._behind.failed if self._behind else 0,
            **{
                name: self._counts[name]
                for name in (
                    "kept_tokens",
                    "saved_bytes",
                    "restored_tokens",
                    "restored_bytes",
                    "read_bytes",
                    "refused_loads",
                )
            },
        }

    # ---- Closing --------------------------------------------------------------------------------

    async def flush(self) -> None:
        """Returns when all that has been kept is on the disk, or could not be written."""
        if self._behind is not None:
            await self._behind.flush()

    async def __aenter__(self) -> Store:
        """Raises OSError where the folder cannot be used."""
        if self._behind is not None:
            await self._behind.open()
        self._tasks = await anyio.create_task_group().__aenter__()
        if self._behind is not None:
            self._tasks.start_soon(self._behind.write_all)
        self._closed = False
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Waits for the writes to the disk, unless the body has failed; then forgets what is in
        RAM."""
        self._closed = True
        try:
            if exception is None:
                await self.flush()
        finally:
            self._tasks.cancel_scope.cancel()
            await self._tasks.__aexit__(None, None, None)
            if self._behind is not None:
                with anyio.CancelScope(shield=True):
                    await self._behind.close()
            self.clear()

    # ---- Arguments ------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise error(lib.KVF_ERR_CLOSED, "the store")

    def _salt_or(self, salt: bytes | None) -> bytes:
        return self._salt if salt is None else _checked_salt(salt)

    @staticmethod
    def _part(tokens: ArrayLike, leave: int) -> Tokens:
        array = checked_tokens(tokens)
        return array[: max(0, len(array) - integer("leave", leave))]


def _checked_salt(salt: object) -> bytes:
    if not isinstance(salt, bytes):
        raise TypeError(f"salt is bytes, not {type(salt).__name__}")
    return salt
