"""Blocks of a sequence as the C library takes them: an array of ``kvf_block``."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .._native import ffi, lib
from .arguments import integer, invalid

if TYPE_CHECKING:
    from .._native import CData

_POSITION_MAX = (1 << 31) - 1

Span = tuple[int, int]
"""The first position of a block, and the position after its last."""


class BlocksAllowed(enum.Enum):
    """What a cache allows: see ``Llama.blocks_allowed``. The values are words of ``describe``."""

    UNSEEN = "unseen"
    """No state with cells has been seen yet: decode something, and ask again."""
    NONE = "none"
    """Neither blocks nor checkpoints: save and load whole states."""
    CHECKPOINTS_ALONE = "checkpoints"
    """Every layer is recurrent: a checkpoint is a whole state."""
    WITH_CHECKPOINTS = "blocks+checkpoints"
    """Blocks, and a checkpoint at the end of the last one."""
    ALONE = "blocks"
    """Blocks, without checkpoints."""

    @property
    def blocks(self) -> bool:
        """Whether ``save_blocks`` works."""
        return self in (BlocksAllowed.ALONE, BlocksAllowed.WITH_CHECKPOINTS)

    @property
    def checkpoints(self) -> bool:
        """Whether ``save_checkpoint`` works, and ``load_blocks`` needs a checkpoint."""
        return self in (BlocksAllowed.CHECKPOINTS_ALONE, BlocksAllowed.WITH_CHECKPOINTS)


ALLOWED: dict[int, BlocksAllowed] = {
    lib.KVF_BLOCKS_UNSEEN: BlocksAllowed.UNSEEN,
    lib.KVF_BLOCKS_NONE: BlocksAllowed.NONE,
    lib.KVF_BLOCKS_CHECKPOINTS_ALONE: BlocksAllowed.CHECKPOINTS_ALONE,
    lib.KVF_BLOCKS_WITH_CHECKPOINTS: BlocksAllowed.WITH_CHECKPOINTS,
    lib.KVF_BLOCKS_ALONE: BlocksAllowed.ALONE,
}
"""The values, by the numbers of the C library."""


def checked_position(name: str, value: object) -> int:
    """Returns a position as an int. Raises TypeError, InvalidArgument."""
    return integer(name, value, most=_POSITION_MAX)


def block_tokens(value: object) -> int:
    """Returns how many tokens a block has. Raises TypeError, InvalidArgument."""
    return integer("tokens", value, least=1, most=_POSITION_MAX)


def checked_key(name: str, value: object) -> bytes:
    """Returns a key of a block or a checkpoint. Raises TypeError."""
    if not isinstance(value, bytes):
        raise TypeError(f"{name}: a key is bytes, not {type(value).__name__}")
    return value


def span(begin: object, end: object) -> Span:
    """Returns the positions [begin, end) of a block. Raises TypeError, InvalidArgument."""
    first, after = checked_position("begin", begin), checked_position("end", end)
    if first >= after:
        raise invalid(f"there is no position between begin, {first}, and end, {after}")
    return first, after


def spans(begin: int, end: int, tokens: int) -> list[Span]:
    """Divides the positions [begin, end) into blocks of ``tokens``; the last may be shorter."""
    return [(first, min(first + tokens, end)) for first in range(begin, end, tokens)]


class BlockList:
    """An array of ``kvf_block``."""

    def __init__(self, blocks: Sequence[tuple[CData, int, Span]]) -> None:
        """Each block is its memory, or NULL; its number of bytes; and its positions. The caller
        keeps the memory alive."""
        self.count = len(blocks)
        self.native: CData = ffi.new(
            "kvf_block[]", [(memory, nbytes, *positions) for memory, nbytes, positions in blocks]
        )
        self.item_size = ffi.sizeof("kvf_block")

    @property
    def sizes(self) -> list[int]:
        """The bytes of each block. After a save these are the numbers that the C library has
        written."""
        return [self.native[index].bytes for index in range(self.count)]
