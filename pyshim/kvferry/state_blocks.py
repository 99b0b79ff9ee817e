"""States cut into blocks and joined again, on plain memory: no engine, no context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ._bridge.arguments import HostMemory, integer, invalid
from ._bridge.block_list import BlockList, span
from ._native import ffi, lib
from .blocks import Block, BlocksToLoad, Checkpoint
from .buffer import borrow
from .errors import ErrorText, check
from .snapshot import Snapshot

if TYPE_CHECKING:
    from ._native import CData


class _StateOptions:
    """A ``kvf_state_options`` with room for the error text."""

    def __init__(self, parts_in_blocks: int) -> None:
        self.text = ErrorText()
        self.options: CData = ffi.new(
            "kvf_state_options *",
            {
                "size": ffi.sizeof("kvf_state_options"),
                "parts_in_blocks": integer("parts_in_blocks", parts_in_blocks, most=0xFFFFFFFF),
                "error": self.text.buffer,
                "error_size": ffi.sizeof(self.text.buffer),
            },
        )


def cut_state(
    state: HostMemory, spans: Sequence[tuple[int, int]], *, parts_in_blocks: int = 0
) -> tuple[list[Block], Checkpoint | None]:
    """Cuts a state into blocks and a checkpoint. Copies the bytes on the calling thread.

    ``state`` is a Snapshot, or contiguous memory with what ``llama_state_seq_get_data`` or another
    program has written. ``spans`` has the first position of each block and the position after its
    last one, in ascending order. ``parts_in_blocks`` says how many parts of the state blocks hold:
    ``Llama.describe()["parts_in_blocks"]``; 0 is the first part. The checkpoint is None for a state
    of plain attention. Otherwise its ``position`` is the last position of the last block. That
    block must therefore reach to the end of the state. The fingerprint of a Snapshot goes into the
    blocks.

    Raises StateDamaged, SequenceEmpty (the state has no token at the positions of a block),
    InvalidArgument (blocks are misordered or overlap), KvferryError (the state has no parts that
    keep every token, or several formats describe it).
    """
    buffer = borrow(state, "state")
    fingerprint = buffer.fingerprint if isinstance(buffer, Snapshot) else None
    positions = [span(begin, end) for begin, end in spans]
    if not positions:
        raise invalid("a state is cut into at least one block")
    options = _StateOptions(parts_in_blocks)
    room = ffi.new("uint64_t *")

    def cut(blocks: BlockList, checkpoint: CData) -> None:
        check(
            lib.kvf_state_cut(
                buffer.memory,
                buffer.nbytes,
                blocks.native,
                blocks.item_size,
                blocks.count,
                checkpoint,
                room,
                options.options,
            ),
            options.text,
        )

    sized = BlockList([(ffi.NULL, 0, each) for each in positions])
    cut(sized, ffi.NULL)
    memories = [ffi.new("uint8_t[]", nbytes) for nbytes in sized.sizes]
    last = ffi.new("uint8_t[]", room[0]) if room[0] else ffi.NULL
    filled = BlockList(list(zip(memories, sized.sizes, positions, strict=True)))
    cut(filled, last)
    blocks = [
        Block(memory, nbytes, begin=begin, end=end, fingerprint=fingerprint)
        for memory, nbytes, (begin, end) in zip(memories, filled.sizes, positions, strict=True)
    ]
    if not room[0]:
        return blocks, None
    at = positions[-1][1] - 1
    return blocks, Checkpoint(last, room[0], position=at, fingerprint=fingerprint)


def join_blocks(
    blocks: Sequence[Block], checkpoint: Checkpoint | None = None, *, parts_in_blocks: int = 0
) -> Snapshot:
    """Joins blocks, and a checkpoint if there is one, to a state that llama.cpp itself loads.

    The opposite of ``cut_state``. Copies the bytes on the calling thread. ``parts_in_blocks`` is as
    for ``cut_state``. The Snapshot has the fingerprint of the blocks.

    Raises StateDamaged, StateMismatch (the blocks are of several models or kinds of cache, or their
    keys are of several conversations), InvalidArgument (there are no blocks, or they are
    misordered, overlap or leave a gap), KvferryError (several formats describe the blocks).
    """
    given = BlocksToLoad(blocks, checkpoint)
    fingerprint = given.fingerprint
    options = _StateOptions(parts_in_blocks)
    room = ffi.new("uint64_t *")

    def join(state: CData) -> None:
        check(
            lib.kvf_state_join(
                given.list.native,
                given.list.item_size,
                given.list.count,
                given.checkpoint_memory,
                given.checkpoint_bytes,
                state,
                room,
                options.options,
            ),
            options.text,
        )

    join(ffi.NULL)
    state = ffi.new("uint8_t[]", room[0])
    join(state)
    return Snapshot(state, room[0], fingerprint=fingerprint, llm=given.llm)
