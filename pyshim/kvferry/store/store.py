"""The store: keeps the KV cache of conversations, and finds it again by their tokens."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

import anyio
import numpy
from numpy.typing import ArrayLike

from .._bridge.arguments import integer, invalid
from .._bridge.block_list import BlocksAllowed
from .._bridge.submission import Priority
from .._native import lib
from ..errors import KvferryError, error
from ..llama import Llama
from .away import Away
from .behind import Behind
from .buffers import Buffers
from .counts import Counts
from .evaluations import Evaluations
from .explaining import Explaining
from .explanation import Explanation
from .identity import Identities
from .keys import chain, checked_tokens
from .names import Listed, Names
from .objects import Objects
from .ram import Ram
from .readings import Readings, readings
from .restoring import Asked, Restoring, Searched
from .saving import Conversation, Saving
from .sizes import size
from .tiers import Tiers
from .tracing import Recorder, TraceSpan, recorded
from .worth import Worth

if TYPE_CHECKING:
    from obstore.store import ObjectStore

log = logging.getLogger("kvferry.store")


@dataclass(frozen=True)
class Found:
    """What ``Store.find`` has found."""

    tokens: int
    """How many of the first tokens are kept; 0 if none are."""
    nbytes: int
    """The bytes that a restore would move."""
    tier: str
    """The farthest tier that a restore reads from: "ram"; "disk" if some bytes are not in RAM;
    "remote" if some are only in the object store; "" if nothing is kept."""
    _searched: Searched | None = field(default=None, repr=False, compare=False)
    """For ``restore``, which need not search again."""


class Store:
    """Keeps the KV cache of conversations, and finds the longest known prefix of a prompt.

    Use it as ``async with kvferry.Store(ram="8 GiB") as store: ...``. A store serves several
    engines, contexts and models. All methods are for the thread of one event loop, and may be
    called by several tasks at a time.

    ram
        The most bytes that the store's buffers may take: an int, or a string such as "8 GiB".
        Buffers that are being filled count.
    disk
        A folder, which several processes may share. A task of the store writes there what has been
        kept, and another process finds it again.
    disk_limit
        The most bytes that the folder may take. Given with ``disk``.
    remote
        An object store, which any number of stores may share: a URL such as "s3://bucket/prefix"
        (needs ``pip install kvferry[remote]``; credentials and endpoint are found in the
        environment, as obstore does), a store object of ``obstore.store``, or an object with the
        functions of ``kvferry.store.objects.Objects``. Tasks of the store write there what has been
        kept.
    block_tokens
        How many tokens a block has. Only what was kept with this number is found.
    salt
        Names the owner of what is kept. It is hashed into every key, so that nothing is found that
        was kept with another salt. Methods also have this argument, for stores that serve several
        owners.
    trace
        Records what the calls do, for ``trace()``.
    """

    def __init__(
        self,
        *,
        ram: int | str,
        disk: str | os.PathLike[str] | None = None,
        disk_limit: int | str | None = None,
        remote: str | ObjectStore | Objects | None = None,
        block_tokens: int = 256,
        salt: bytes = b"",
        trace: bool = False,
    ) -> None:
        """Raises TypeError, InvalidArgument; ImportError where ``remote`` needs obstore."""
        self._ram = Ram(size("ram", ram))
        self._behind: Behind | None = None
        if (disk is None) != (disk_limit is None):
            raise invalid("disk and disk_limit are given both or neither")
        if disk is not None:
            limit = size("disk_limit", disk_limit)
            self._behind = Behind(disk, limit, pinned=self._ram.pinned)
        self._block_tokens = integer("block_tokens", block_tokens, least=1)
        self._away: Away | None = None
        if remote is not None:
            self._away = Away(
                remote, block_tokens=self._block_tokens, most_pending=self._ram.limit // 4
            )
        self._salt = _checked_salt(salt)
        self._counts = Counts()
        self._recorder = Recorder() if trace else None
        self._identities = Identities(anyio.CapacityLimiter(1), self._behind, self._away)
        self._names = Names(self._ram)
        tiers = Tiers(
            self._ram,
            self._behind,
            self._away,
            Buffers(self._ram, self._behind),
            self._block_tokens,
            self._counts,
        )
        self._worth = Worth()
        self._evaluations = Evaluations(self._worth)
        self._restoring = Restoring(tiers, self._identities, self._worth)
        self._explaining = Explaining(tiers, self._identities, self._worth, self._restoring)
        self._saving = Saving(tiers)
        self._closed = True  # until it is entered

    # ---- Finding and restoring ------------------------------------------------------------------

    @recorded("find")
    async def find(
        self, llama: Llama, tokens: ArrayLike, *, leave: int = 1, salt: bytes | None = None
    ) -> Found:
        """Returns the longest known prefix. ``restore`` takes what this returns, and then does not
        search again.

        For a context that has never had a cell, several caches are possible. This returns the
        longest prefix of all of them, and ``restore`` may find that it does not fit the context.
        """
        self._check_open()
        begin = time.monotonic()
        asked = self._asked(llama, tokens, leave, salt)
        searched = await self._restoring.search(asked)
        self._counts.find_seconds.observe(time.monotonic() - begin)
        if not searched.prefixes:
            return Found(0, 0, "", searched)
        longest = searched.prefixes[0]
        return Found(longest.end, longest.nbytes, longest.farthest, searched)

    @recorded("restore")
    async def restore(
        self,
        llama: Llama,
        seq: int,
        tokens: ArrayLike,
        *,
        leave: int = 1,
        held: int | None = None,
        found: Found | None = None,
        salt: bytes | None = None,
        priority: Priority = "urgent",
    ) -> int:
        """Loads the longest known prefix into a sequence, in place of what the sequence held.

        Returns how many tokens the sequence holds then. The program goes on with the tokens after
        these. If nothing is restored, the sequence is emptied, and this returns 0.

        Blocks that would take longer to bring than to evaluate are not brought, as far as the
        speeds of both have been measured: then a shorter prefix is restored, or none. See
        ``explain``.

        ``leave`` is how many tokens at the end are not restored, even if they are known. A state
        has no logits, so at least one token must be decoded before the next one is sampled.

        ``held`` is for a program that can go on from what the sequence holds: how many of the first
        ``tokens`` the sequence holds already. If no longer prefix is worth its restore, the
        sequence stays as it is, and this returns ``held``.

        ``found`` is what ``find`` has returned for the same context, salt and tokens: this restores
        that prefix, without a search. If some of it has been evicted meanwhile, this searches.

        If the disk fails or hangs, or RAM has no room for the parts that it lacks, this restores
        the prefix that is in RAM.

        If the task is cancelled, or this raises, ``llama.load_outcome(seq)`` tells what the
        sequence holds. Raises CacheFull, SequenceRange, PinnedLimit, EngineClosed, ContextFreed,
        Busy (a transfer of the sequence is in flight), InvalidArgument (``found`` is of other
        arguments), and KvferryError (the store is closed).
        """
        self._check_open()
        asked = self._asked(llama, tokens, leave, salt)
        least = 0 if held is None else integer("held", held)
        searched = None if found is None else _searched(found, asked)
        count = await self._restoring.restore(asked, seq, least, priority, searched)
        if not count:
            if held is None:
                await llama.remove(seq)
            count = least
        await self._evaluations.restored(llama, seq, count)
        return count

    async def explain(
        self,
        llama: Llama,
        tokens: ArrayLike,
        *,
        leave: int = 1,
        held: int = 0,
        salt: bytes | None = None,
    ) -> Explanation:
        """Says what is known of a prompt and where it lies, what ``restore`` with the same
        arguments would bring now, why, and why not more was found.

        Moves nothing, but searches all tiers. Of what others have kept, this tells what has the
        same salt, and only for models of contexts that this store has been called with.
        """
        self._check_open()
        asked = self._asked(llama, tokens, leave, salt)
        return await self._explaining.explain(asked, integer("held", held))

    def prefetch(self, llama: Llama, tokens: ArrayLike, *, salt: bytes | None = None) -> None:
        """Reads the longest known prefix from disk and object store into RAM, in a task of the
        store. Returns at once. A failure is in the log."""
        self._check_open()
        self._tasks.start_soon(self._prefetch, self._asked(llama, tokens, 0, salt))

    @recorded("prefetch")
    async def _prefetch(self, asked: Asked) -> None:
        try:
            await self._restoring.prefetch(asked)
        except Exception as problem:
            # Nobody waits for this task, and an error here would end the other tasks of the store.
            unexpected = not isinstance(problem, (KvferryError, OSError))
            log.warning("a prefix was not brought to RAM ahead: %r", problem, exc_info=unexpected)

    # ---- Speeds ---------------------------------------------------------------------------------

    def note_prefill(self, llama: Llama, tokens: int, seconds: float, *, begin: int = 0) -> None:
        """Tells the store that the context has evaluated ``tokens`` tokens of a prompt, at the
        positions from ``begin`` on, in so many seconds.

        With this the store knows what is worth its restore. Of a ``llama_cpp.Llama`` it measures
        that itself. Raises InvalidArgument.
        """
        self._check_open()
        count, begin = integer("tokens", tokens, least=1), integer("begin", begin)
        if not seconds > 0:
            raise invalid(f"seconds are {seconds}")
        self._worth.prefill(llama).note(count, seconds, begin)

    # ---- Keeping --------------------------------------------------------------------------------

    @recorded("keep")
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
        """Keeps the state of these tokens, which the sequence holds at its positions from 0 on.

        Only blocks and checkpoints that are neither in RAM nor on the disk are saved. The sequence
        may be decoded further meanwhile. But if the cache needs checkpoints, the sequence must end
        with ``tokens`` from the call of this until the context's thread has taken the checkpoint.

        Returns how many of the tokens are kept then: fewer than given if the budget has no room for
        all. If the cache needs checkpoints, all tokens are kept or none.

        ``name`` is for ``pin``, ``evict`` and ``list``. An older conversation of this name loses
        it. ``ttl`` is how many seconds RAM finds the conversation; blocks that several
        conversations share are found for the longest of their times. The disk knows neither names
        nor times: it finds what it has until its limit needs the room.

        If the task is cancelled, the save is cancelled, and nothing more is kept.

        Raises InvalidArgument (the sequence does not hold the tokens at these positions),
        SequenceEmpty, SequenceRange, PinnedLimit, EngineClosed, ContextFreed, KvferryError (the
        cache allows neither blocks nor checkpoints; the store is closed), and Busy (a load into the
        sequence is in flight).
        """
        self._check_open()
        begin = time.monotonic()
        tokens = checked_tokens(tokens)
        await self._evaluations.kept(llama, seq, len(tokens))
        expires = None if ttl is None else time.monotonic() + ttl
        kept, why = await self._identities.to_keep(llama, self._salt_or(salt))
        if kept.allowed is BlocksAllowed.UNSEEN:
            raise error(lib.KVF_ERR_SEQUENCE_EMPTY, why)
        if kept.allowed is BlocksAllowed.NONE:
            raise error(lib.KVF_ERR_UNSUPPORTED, why)
        links = chain(kept.root, tokens, self._block_tokens)
        if not links:
            return 0
        conversation = Conversation(llama, seq, tokens, kept, links)
        end, ids = await self._saving.save(conversation, expires, priority)
        self._counts.kept_tokens += end
        self._counts.keep_seconds.observe(time.monotonic() - begin)
        if name is not None:
            self._names.give(name, end, ids)
        return end

    # ---- What is kept ---------------------------------------------------------------------------

    def pin(self, name: str) -> None:
        """Keeps the conversation of this name from being evicted from RAM, and by this store from
        the disk, until ``unpin``, ``evict`` or ``clear``, or until the store is closed. Raises
        KeyError."""
        self._names.pin(name)

    def unpin(self, name: str) -> None:
        """Ends ``pin``. Raises KeyError."""
        self._names.unpin(name)

    def evict(self, name: str) -> int:
        """Removes the name, its pin, and the conversation from RAM.

        Blocks that other conversations share, or that a transfer uses now, stay. Returns how many
        blocks and checkpoints were removed. Raises KeyError.
        """
        ids = self._names.drop(name)
        return self._ram.remove_all(entry for each in ids if (entry := self._ram.entry(each)))

    def clear(self) -> int:
        """Removes all names, their pins, and everything from RAM, except for what a transfer uses
        now. Returns as ``evict``."""
        self._names.drop_all()
        return self._ram.remove_all(self._ram)

    def trace(self) -> list[TraceSpan]:
        """Takes the recorded spans of calls, in the order of their ends; ``kvferry.write_trace``
        makes a file of them. The store keeps the latest 65,536.

        Needs ``Store(trace=True)``; else there are none.
        """
        return self._recorder.take() if self._recorder is not None else []

    def list(self) -> list[Listed]:
        """Returns the conversations that have a name."""
        return self._names.list()

    def stats(self) -> dict[str, int]:
        """Returns counters since the store was made, and what it holds now."""
        return {
            "ram_limit": self._ram.limit,
            "ram_used": self._ram.used,
            "ram_reserved": self._ram.reserved,
            "ram_entries": len(self._ram),
            "evicted": self._ram.evicted,
            "disk_writes_pending": self._behind.writes.pending if self._behind else 0,
            "disk_writes_failed": self._behind.writes.failed if self._behind else 0,
            **(self._away.stats() if self._away else {}),
            **{
                name: getattr(self._counts, name)
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

    def readings(self) -> Readings:
        """Returns the numbers that ``kvferry.metrics`` exports. Any thread may call this."""
        return readings(self._counts, self._ram, self._behind, self._away)

    # ---- Closing --------------------------------------------------------------------------------

    async def flush(self) -> None:
        """Returns when the disk and the object store have all that has been kept, except for what
        could not be written. Returns earlier if the disk hangs
        (``stats()["disk_writes_pending"]`` is not 0 then)."""
        if self._behind is not None:
            await self._behind.flush()
        if self._away is not None:
            await self._away.flush()

    async def __aenter__(self) -> Store:
        """Raises OSError where the folder cannot be used."""
        if self._behind is not None:
            await self._behind.open()
        if self._away is not None:
            await self._away.open()
        self._tasks = await anyio.create_task_group().__aenter__()
        self._closed = False
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Waits for the writes to disk and object store, unless the body has raised. Then frees all
        memory."""
        self._closed = True
        try:
            if exception is None:
                await self.flush()
        finally:
            self._tasks.cancel_scope.cancel()
            try:
                await self._tasks.__aexit__(None, None, None)
            finally:
                try:
                    if self._away is not None:
                        await self._away.close()
                finally:
                    try:
                        if self._behind is not None:
                            await self._behind.close()
                    finally:
                        self.clear()

    # ---- Arguments ------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise error(lib.KVF_ERR_CLOSED, "the store")

    def _salt_or(self, salt: bytes | None) -> bytes:
        return self._salt if salt is None else _checked_salt(salt)

    def _asked(self, llama: Llama, tokens: ArrayLike, leave: int, salt: bytes | None) -> Asked:
        array = checked_tokens(tokens)
        part = array[: max(0, len(array) - integer("leave", leave))]
        return Asked(llama, part, self._salt_or(salt))


def _searched(found: Found, asked: Asked) -> Searched:
    """The search that has found something, if it was of the same arguments."""
    searched = found._searched
    if searched is None:
        raise invalid("found was not returned by find")
    same = searched.llama is asked.llama and searched.salt == asked.salt
    if not same or not numpy.array_equal(
        searched.tokens[: found.tokens], asked.tokens[: found.tokens]
    ):
        raise invalid("found is of another context, of another salt or of other tokens")
    return searched


def _checked_salt(salt: object) -> bytes:
    if not isinstance(salt, bytes):
        raise TypeError(f"salt is bytes, not {type(salt).__name__}")
    return salt
