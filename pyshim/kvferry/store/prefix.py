"""The longest known prefix of a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .._bridge.block_list import BlocksAllowed
from .keys import Link, Tokens, chain, next_key
from .ram import Entry, Ram


@dataclass(frozen=True)
class Prefix:
    """What a load of the first tokens of a prompt needs."""

    blocks: list[Entry]
    checkpoint: Entry | None
    end: int
    """How many tokens it has."""

    @property
    def entries(self) -> list[Entry]:
        return self.blocks if self.checkpoint is None else [*self.blocks, self.checkpoint]

    @property
    def nbytes(self) -> int:
        return sum(entry.description.nbytes for entry in self.entries)


def longest_prefix(
    ram: Ram, root: bytes, allowed: BlocksAllowed, tokens: Tokens, block_tokens: int
) -> Prefix | None:
    """Returns the longest prefix of the tokens that is kept and can be loaded; None if there is
    none.

    Keys of whole blocks are followed from the root on. What ends elsewhere is found by its parent:
    the tokens up to where it ends must give its key.
    """
    links = chain(root, tokens[: len(tokens) // block_tokens * block_tokens], block_tokens)
    blocks: list[Entry] = []
    if allowed.blocks:
        for link in links:
            if (block := ram.get("block", link.key)) is None:
                break
            blocks.append(block)
        links = links[: len(blocks)]
    for count in range(len(links), -1, -1):
        parent = links[count - 1].key if count else root
        for link in _shorter(ram, parent, count * block_tokens, tokens, block_tokens):
            if found := _loadable(ram, allowed, blocks[:count], link):
                return found
        if count and (found := _loadable(ram, allowed, blocks[: count - 1], links[count - 1])):
            return found
    return None


def _shorter(
    ram: Ram, parent: bytes, begin: int, tokens: Tokens, block_tokens: int
) -> Iterator[Link]:
    """What may be kept behind a whole block and ends before the next whole one, longest first."""
    for end in ram.ends(parent):
        if begin < end < begin + block_tokens and end <= len(tokens):
            yield Link(begin, end, next_key(parent, tokens[begin:end]), parent)


def _loadable(ram: Ram, allowed: BlocksAllowed, before: list[Entry], last: Link) -> Prefix | None:
    """The prefix that ends with ``last``, if all that it needs is there."""
    blocks, checkpoint = [], None
    if allowed.blocks:
        if (block := ram.get("block", last.key)) is None:
            return None
        blocks = [*before, block]
    if allowed.checkpoints and (checkpoint := ram.get("checkpoint", last.key)) is None:
        return None
    return Prefix(blocks, checkpoint, last.end)
