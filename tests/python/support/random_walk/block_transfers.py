"""Transfers of blocks and checkpoints: kvferry's in one context, whole states by llama.cpp's own
calls in the other.
"""

from __future__ import annotations

import ctypes
from typing import Any

from support import c_interface
from support.block_reference import (
    PARTS_IN_BLOCKS,
    WITH_CHECKPOINTS,
    cut_by_format,
    positions_in_order,
    rest_ends_at,
    rest_of,
)
from support.blocks import ranges_that_begin_at
from support.c_interface import Block, Blocks, SaveMode
from support.random_walk.state import Unequal, WalkState
from support.random_walk.transfers import Moved, Transfers

Cut = tuple[list[Block], bytes | None]
"""Blocks, and a checkpoint where the cache has them."""


class BlockTransfers:
    """Of kinds with neither blocks nor checkpoints it saves and loads nothing."""

    def __init__(self, walk: WalkState, transfers: Transfers) -> None:
        self._walk = walk
        self._transfers = transfers
        self._kind = walk.can.kind
        self._parts = PARTS_IN_BLOCKS.get(self._kind, 0)
        self.has_blocks = self._parts > 0
        # Without layers that keep every token, a checkpoint is a whole state.
        self.has_checkpoints = not self.has_blocks or self._kind in WITH_CHECKPOINTS

    def save_blocks(self) -> None:
        """Saves some blocks of a sequence, which need not follow one another."""
        walk = self._walk
        seq = self._transfers.choose_to_save()
        if seq is None:
            return
        state = walk.like.state_get(seq)
        ranges = [each for each in self._ranges(state) if walk.random.random() < 0.7]
        if not ranges:
            return
        walk.note(f"{ranges}")
        states = [cut_by_format(self._kind, state, *each) for each in ranges]
        room = Blocks(ranges, [ctypes.create_string_buffer(len(each)) for each in states])
        mode = walk.random.choice(tuple(SaveMode))

        def submit(attachment: c_interface.Attachment, **options: Any) -> c_interface.Job:
            return attachment.save_blocks(seq, room, **options)

        def read() -> bytes:
            return b"".join(block.state for block in room.read())

        is_snapshot = mode == SaveMode.SNAPSHOT
        # Decoding never overwrites what blocks consist of.
        moved = Moved("save", submit, read, b"".join(states), state, mode, is_snapshot, True)
        if failure := self._transfers.start(seq, moved):
            raise failure

    def save_checkpoint(self) -> None:
        walk = self._walk
        seq = self._transfers.choose_to_save()
        if seq is None:
            return
        expected = walk.like.partial_state_get(seq)
        buffer = ctypes.create_string_buffer(len(expected))

        def submit(attachment: c_interface.Attachment, **options: Any) -> c_interface.Job:
            return attachment.save_checkpoint(seq, buffer, **options)

        def read() -> bytes:
            return buffer.raw

        state = walk.like.state_get(seq)
        moved = Moved("save", submit, read, expected, state, SaveMode.SNAPSHOT, True, True)
        if failure := self._transfers.start(seq, moved):
            raise failure

    def load_blocks(self) -> None:
        """Loads what a state that was saved is cut into."""
        walk = self._walk
        seq = walk.choose(walk.loadable())
        if seq is None or not walk.attachments or not walk.states:
            return
        state = walk.random.choice(walk.states)
        blocks, checkpoint = self._cut(state)
        walk.note(f"{len(blocks)} blocks")
        if blocks and checkpoint and not rest_ends_at(self._kind, state, blocks[-1].end - 1):
            walk.note("which the checkpoint does not fit")
            self.is_refused(seq, (blocks, checkpoint))
            return
        joined = walk.library.join(Blocks.of(blocks), checkpoint, self._parts) if blocks else state
        given = Blocks.of(blocks)

        def submit(attachment: c_interface.Attachment, **options: Any) -> c_interface.Job:
            return attachment.load_blocks(seq, given, checkpoint, **options)

        self._transfers.load_by(submit, seq, joined)

    def load_damaged_blocks(self) -> None:
        """Loads what does not belong together: it is refused, and the sequence is as it was."""
        walk = self._walk
        seq = walk.choose(walk.resting())
        if seq is None or not walk.attachments or not walk.states:
            return
        blocks, checkpoint = self._cut(walk.random.choice(walk.states))
        damage = walk.random.choice(("truncated", "moved", "a gap", "without a checkpoint"))
        walk.note(f"{seq} {damage}")
        if damage == "without a checkpoint" and checkpoint and blocks:
            checkpoint = None
        elif damage == "a gap" and len(blocks) > 2:
            del blocks[walk.random.randrange(1, len(blocks) - 1)]
        elif damage == "moved" and blocks:
            blocks = [Block(block.begin + 1, block.end + 1, block.state) for block in blocks]
        elif blocks:
            index = walk.random.randrange(len(blocks))
            one = blocks[index]
            blocks[index] = Block(one.begin, one.end, one.state[:-1])
        elif checkpoint:
            checkpoint = checkpoint[:-1]
        self.is_refused(seq, (blocks, checkpoint))

    def is_refused(self, seq: int, cut: Cut) -> None:
        """Raises if kvferry loads these blocks."""
        walk = self._walk
        blocks, checkpoint = cut
        before = walk.ours.state_size(seq)
        try:
            walk.random.choice(walk.attachments).load_blocks(seq, Blocks.of(blocks), checkpoint)
        except c_interface.Failure as failure:
            if failure.name not in ("KVF_ERR_STATE_DAMAGED", "KVF_ERR_INVALID_ARGUMENT"):
                raise
        else:
            raise Unequal("blocks were loaded that do not belong together")
        if walk.ours.state_size(seq) != before:
            raise Unequal(f"sequence {seq} was changed by a load that was refused")

    def _cut(self, state: bytes) -> Cut:
        """Cuts a state into blocks that follow one another, and a checkpoint."""
        if not self.has_blocks:
            return [], state
        blocks = [
            Block(*each, cut_by_format(self._kind, state, *each)) for each in self._ranges(state)
        ]
        return blocks, rest_of(self._kind, state) if self.has_checkpoints else None

    def _ranges(self, state: bytes) -> list[tuple[int, int]]:
        """Returns ranges that cover the positions of a state, cut anywhere."""
        walk = self._walk
        positions = sorted(set(positions_in_order(self._kind, state)))
        count = min(len(positions) - 1, walk.random.choice((0, 1, 3, 8)))
        begins = walk.random.sample(positions[1:], count)
        return ranges_that_begin_at(begins, positions)
