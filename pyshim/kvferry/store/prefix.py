"""The longest known prefix of a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from .._bridge.block_list import BlocksAllowed
from .description import Description, Kind
from .disk import Disk
from .keys import Link, Tokens, chain, next_key
from .ram import Ram

_MOST_ASKED = 512  # a statement of SQLite may have at least 999 values


class Lookup(Protocol):
    """Where parts are looked for."""

    def find(self, kind: Kind, key: bytes) -> Description | None: ...
    def ends(self, parent: bytes) -> list[int]: ...


class InBoth:
    """Looks into RAM, then into the folder. May block on the disk. For one search.

    The search follows keys that are known before, and a question to the index for many keys takes
    hardly longer than one for a single key. Most searches end at the first block, and others find a
    hundred. So the first question is for one block, and each further question is for eight times as
    many.
    """

    def __init__(self, ram: Ram, disk: Disk, blocks: Sequence[bytes] = ()) -> None:
        """``blocks`` are the keys of the blocks of the prompt, in order."""
        self._ram = ram
        self._disk = disk
        self._blocks = blocks
        self._places = {key: place for place, key in enumerate(blocks)}
        self._asked: dict[bytes, Description | None] = {}
        self._count = 1

    def find(self, kind: Kind, key: bytes) -> Description | None:
        if (found := self._ram.find(kind, key)) is not None:
            return found
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
        on_disk = {each.end for each in self._disk.children(parent)}
        return list(on_disk.union(self._ram.ends(parent)))


class InTurn:
    """Looks into one Lookup, then into another."""

    def __init__(self, first: Lookup, second: Lookup) -> None:
        self._first = first
        self._second = second

    def find(self, kind: Kind, key: bytes) -> Description | None:
        return self._first.find(kind, key) or self._second.find(kind, key)

    def ends(self, parent: bytes) -> list[int]:
        return list({*self._first.ends(parent), *self._second.ends(parent)})


@dataclass(frozen=True)
class Prefix:
    """What a load of the first tokens of a prompt needs."""

    blocks: list[Description]
    checkpoint: Description | None
    end: int
    """How many tokens the prefix has."""

    @property
    def parts(self) -> list[Description]:
        return self.blocks if self.checkpoint is None else [*self.blocks, self.checkpoint]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class Search:
    """A search for the longest prefix of tokens that is kept and can be loaded.

    The search follows the keys of whole blocks from the root on. A part that ends elsewhere is
    found by its parent: the tokens up to its end must give its key.
    """

    lookup: Lookup
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
        return Prefix(blocks, checkpoint, last.end)

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
