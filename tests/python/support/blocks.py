"""Blocks and checkpoints by the C functions, for tests that hold them against llama.cpp."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterable, Sequence

from support import c_interface
from support.block_histories import SEQ, SEQUENCES, TARGET
from support.block_reference import positions_in_order
from support.c_interface import Block, Blocks
from support.llama_reference import Context

LIBRARY = c_interface.Library(c_interface.LIBRARY)

Pair = tuple[Context, Context]
"""Two equal contexts: one for kvferry, one for llama.cpp's own calls."""

MakePair = Callable[[str, str], Pair]
"""By the kind of a model and the name of a cache."""


def ranges_of(state: bytes, kind: str, tokens: int = 16) -> list[tuple[int, int]]:
    """Returns ranges that cover the positions of a state; the last is the shorter tail. Each has so
    many positions that there are, and more if some are missing.
    """
    positions = sorted(set(positions_in_order(kind, state)))
    return list(itertools.pairwise([*positions[::tokens], positions[-1] + 1]))


def ranges_that_begin_at(begins: Iterable[int], positions: Iterable[int]) -> list[tuple[int, int]]:
    """Returns ranges that cover these positions, and begin at the first and at some others."""
    whole = sorted(set(positions))
    return list(itertools.pairwise([*sorted({whole[0], *begins}), whole[-1] + 1]))


def save_blocks(
    attachment: c_interface.Attachment,
    ranges: Sequence[tuple[int, int]],
    seq: int = SEQ,
    room: int = 0,
) -> list[Block]:
    """Saves blocks into buffers of `room` bytes; 0: of one cell for each position."""
    most = max(end - begin for begin, end in ranges)
    blocks = Blocks.with_room(ranges, room or attachment.block_size(most))
    assert attachment.save_blocks(seq, blocks).wait() == "KVF_OK"
    return blocks.read()


def save_checkpoint(attachment: c_interface.Attachment, seq: int = SEQ) -> bytes:
    buffer = ctypes.create_string_buffer(attachment.checkpoint_size(seq))
    assert attachment.save_checkpoint(seq, buffer).wait() == "KVF_OK"
    return buffer.raw


def others(context: Context) -> list[bytes]:
    """Returns the states of all sequences but the target."""
    return [context.state_get(seq) for seq in range(SEQUENCES) if seq != TARGET]
