"""The longest known prefix of a prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from .._bridge.block_list import BlocksAllowed
from .counts import TIERS as TIERS
from .counts import Tier as Tier
from .description import Description, Kind
from .disk import Disk
from .keys import Link, Tokens, chain, next_key

_MOST_ASKED = 512  # a statement of SQLite may have at least 999 values


class Lookup(Protocol):
    """Where parts are looked for."""

    def find(self, kind: Kind, key: bytes) -> Description | None: ...
    def ends(self, parent: bytes) -> list[int]: ...


class InTurn:
    """Looks into the tiers, one after the other."""

    def __init__(self, tiers: Mapping[Tier, Lookup]) -> None:
        self._tiers = tiers
        self._found_in: dict[tuple[Kind, bytes], Tier] = {}

    def find(self, kind: Kind, key: bytes) -> Description | None:
        for tier, lookup in self._tiers.items():
            if (found := lookup.find(kind, key)) is not None:
                self._found_in[kind, key] = tier
                return found
        return None

    def ends(self, parent: bytes) -> list[int]:
        return list({end for lookup in self._tiers.values() for end in lookup.ends(parent)})

    def tiers(self, parts: Iterable[Description]) -> tuple[Tier, ...]:
        """In which tier each part was found."""
        return tuple(self._found_in[part.kind, part.key] for part in parts)


class OnDisk:
    """Looks into the folder. May block on the disk. For one search.

    The search follows keys that are known before, and a question to the index for many keys takes
    hardly longer than one for a single key. Most searches end at the first block, and others find a
    hundred. So the first question is for one block, and each further question is for eight times as
    many.
    """

    def __init__(self, disk: Disk, blocks: Sequence[bytes] = ()) -> None:
        """``blocks`` are the keys of the blocks of the prompt, in order."""
        self._disk = disk
        self._blocks = blocks
        self._places = {key: place for place, key in enumerate(blocks)}
        self._asked: dict[bytes, Description | None] = {}
        self._count = 1

    def find(self, kind: Kind, key: bytes) -> Description | None:
        if kind != "block" or key not in self._places:
            return self._disk.find(kind, key)
        if key not in self._asked:
            first = self._places[key]
            asked = self._blocks[first : first + self._count]
            self._count = min(_MOST_ASKED, 8 * self._count)
            self._asked.update(dict.fromkeys(asked))
            self._asked.update((each.key, each) for each in self._disk.find_all(kind, asked))
        return self._asked[key]

    def ends(self, parent: bytes) -> list[int]:
        return self._disk.ends(parent)


@dataclass(frozen=True)
class Prefix:
    """What a load of the first tokens of a prompt needs."""

    blocks: list[Description]
    checkpoint: Description | None
    end: int
    """How many tokens the prefix has."""
    tiers: tuple[Tier, ...]
    """Where each of ``parts`` lies: the nearest tier that had it when the search asked."""

    @property
    def parts(self) -> list[Description]:
        return self.blocks if self.checkpoint is None else [*self.blocks, self.checkpoint]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @cached_property
    def nbytes_of(self) -> dict[Tier, int]:
        """The bytes that lie in each tier."""
        counted: Counter[Tier] = Counter()
        for tier, part in zip(self.tiers, self.parts, strict=True):
            counted[tier] += part.nbytes
        return dict(counted)

    @property
    def farthest(self) -> Tier:
        """The farthest tier that something of it must be brought from."""
        return max(self.tiers, key=TIERS.index)

    def beginnings(self) -> Iterator[tuple[int, dict[Tier, int]]]:
        """Shorter prefixes that can be loaded, where the next block lies in another tier: the
        number of their blocks, and their bytes in each tier."""
        nbytes: dict[Tier, int] = {}
        if self.checkpoint is None:
            for count, block in enumerate(self.blocks[:-1], 1):
                tier = self.tiers[count - 1]
                nbytes[tier] = nbytes.get(tier, 0) + block.nbytes
                if self.tiers[count] != tier:
                    yield count, dict(nbytes)

    def beginning(self, count: int) -> Prefix:
        """The prefix of its first blocks."""
        return Prefix(self.blocks[:count], None, self.blocks[count - 1].end, self.tiers[:count])


@dataclass(frozen=True)
class Search:
    """A search for the longest prefix of tokens that is kept and can be loaded.

    The search follows the keys of whole blocks from the root on. A part that ends elsewhere is
    found by its parent: the tokens up to its end must give its key.
    """

    lookup: InTurn
    root: bytes
    allowed: BlocksAllowed
    tokens: Tokens
    block_tokens: int
    chained: list[Link] | None = None
    """The whole blocks of the prompt, where they are known already."""

    @cached_property
    def links(self) -> list[Link]:
        """The whole blocks of the prompt."""
        if self.chained is not None:
            return self.chained
        whole = len(self.tokens) // self.block_tokens * self.block_tokens
        return chain(self.root, self.tokens[:whole], self.block_tokens)

    def run(self) -> Prefix | None:
        """Returns None if there is none."""
        links = self.links
        blocks: list[Description] = []
        if self.allowed.blocks:
            for link in links:
                if (block := self._block(link)) is None:
                    break
                blocks.append(block)
            links = links[: len(blocks)]
        for count in range(len(links), -1, -1):
            parent = links[count - 1].key if count else self.root
            for link in self._shorter(parent, count * self.block_tokens):
                if found := self._loadable(blocks[:count], link):
                    return found
            if count and (found := self._loadable(blocks[: count - 1], links[count - 1])):
                return found
        return None

    def _shorter(self, parent: bytes, begin: int) -> Iterator[Link]:
        """Gives the links of parts that end behind a whole block and before the next, longest
        first."""
        for end in sorted(self.lookup.ends(parent), reverse=True):
            if begin < end < begin + self.block_tokens and end <= len(self.tokens):
                yield Link(begin, end, next_key(parent, self.tokens[begin:end]), parent)

    def _loadable(self, before: list[Description], last: Link) -> Prefix | None:
        """Returns the prefix that ends with ``last``, if all that it needs is there."""
        blocks: list[Description] = []
        checkpoint = None
        if self.allowed.blocks:
            if (block := self._block(last)) is None:
                return None
            blocks = [*before, block]
        if self.allowed.checkpoints and (checkpoint := self._checkpoint(last)) is None:
            return None
        parts = blocks if checkpoint is None else [*blocks, checkpoint]
        return Prefix(blocks, checkpoint, last.end, self.lookup.tiers(parts))

    def _block(self, link: Link) -> Description | None:
        return self._right(self.lookup.find("block", link.key), link, link.begin)

    def _checkpoint(self, link: Link) -> Description | None:
        return self._right(self.lookup.find("checkpoint", link.key), link, link.end)

    def _right(self, found: Description | None, link: Link, begin: int) -> Description | None:
        """Returns what was found if its description fits its key: a file may say anything."""
        if found is None:
            return None
        told = (found.key, found.parent, found.begin, found.end, found.root)
        return found if told == (link.key, link.parent, begin, link.end, self.root) else None
