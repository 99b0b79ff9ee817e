"""Holds blocks and checkpoints of kvferry, and what is loaded from them, against llama.cpp."""

from __future__ import annotations

import collections
import ctypes
import dataclasses
from collections.abc import Callable, Sequence

import pytest

from support.block_histories import SEQ, SEQUENCES, TARGET
from support.block_reference import (
    PARTS_IN_BLOCKS,
    WITH_CHECKPOINTS,
    blocks_by_llama_cpp,
    content,
    positions_in_order,
    rest_ends_at,
    rest_of,
)
from support.blocks import LIBRARY, Pair, save_checkpoint
from support.c_interface import Attachment, Block, Blocks, Failure, LoadMode, SaveMode
from support.llama_reference import Context, Refused

Range = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the blocks of SEQ are saved, and where they are loaded."""

    ranges: Sequence[Range]
    """They cover the positions of the sequence."""
    calls: Sequence[Sequence[int]] = ()
    """The indices of the blocks that each call saves; by default one call saves all."""
    target: int = TARGET
    save_mode: SaveMode = SaveMode.AUTO
    load_mode: LoadMode = LoadMode.AUTO


def states(context: Context) -> list[bytes]:
    return [context.state_get(seq) for seq in range(SEQUENCES)]


class Comparison:
    """A history that is played in two contexts: one for kvferry, one for llama.cpp."""

    def __init__(
        self,
        attachment: Attachment,
        pair: Pair,
        kind: str,
        history: Callable[[Context], None],
        plan: Plan,
    ) -> None:
        self.attachment = attachment
        self.ours, self.like = pair
        self.kind = kind
        self.history = history
        self.plan = plan
        self.parts = PARTS_IN_BLOCKS[kind]
        self.before = states(self.ours)
        self.state = self.before[SEQ]
        assert states(self.like) == self.before

    def run(self) -> None:
        blocks = self._save_blocks()
        checkpoint = self._save_checkpoint()
        # Nothing that was borrowed for it is left.
        assert states(self.ours) == self.before
        self._cut(blocks, checkpoint)
        end = blocks[-1].end
        if self.kind in WITH_CHECKPOINTS and not rest_ends_at(self.kind, self.state, end - 1):
            self._is_refused(blocks)
        else:
            self._load(blocks, checkpoint)

    def _save_blocks(self) -> list[Block]:
        ranges = self.plan.ranges
        saved: dict[int, Block] = {}
        for call in self.plan.calls or [range(len(ranges))]:
            blocks = Blocks.with_room([ranges[index] for index in call], len(self.state))
            job = self.attachment.save_blocks(SEQ, blocks, mode=self.plan.save_mode)
            assert job.wait() == "KVF_OK"
            saved |= dict(zip(call, blocks.read(), strict=True))
        blocks_in_order = [saved[index] for index in range(len(ranges))]
        expected = blocks_by_llama_cpp(self.like, self.kind, self.history, ranges)
        assert [block.state for block in blocks_in_order] == expected
        return blocks_in_order

    def _save_checkpoint(self) -> bytes | None:
        if self.kind not in WITH_CHECKPOINTS:
            return None
        if self.ours.pos_max(SEQ) < 0:
            with pytest.raises(Failure, match="KVF_ERR_SEQUENCE_EMPTY"):
                save_checkpoint(self.attachment)
            return None
        checkpoint = save_checkpoint(self.attachment)
        assert checkpoint == self.like.partial_state_get(SEQ) == rest_of(self.kind, self.state)
        return checkpoint

    def _cut(self, blocks: list[Block], checkpoint: bytes | None) -> None:
        """The whole state is cut into the same."""
        cut = Blocks.with_room(self.plan.ranges, max(len(block.state) for block in blocks))
        rest = rest_of(self.kind, self.state) if self.kind in WITH_CHECKPOINTS else b""
        room = ctypes.create_string_buffer(max(1, len(rest)))
        assert LIBRARY.cut(self.state, cut, room, self.parts) == len(rest)
        assert cut.read() == blocks
        assert checkpoint in (None, room.raw)

    def _is_refused(self, blocks: list[Block]) -> None:
        """The window or the recurrent layers are of another position than the end of the blocks."""
        before = states(self.ours)
        with pytest.raises(Failure, match="the checkpoint is of position"):
            self.attachment.load_blocks(
                self.plan.target, Blocks.of(blocks), rest_of(self.kind, self.state)
            )
        assert states(self.ours) == before

    def _load(self, blocks: list[Block], checkpoint: bytes | None) -> None:
        """The blocks are joined to what has the same cells. A sequence that is loaded from them is
        that which llama.cpp loads from the joined state.
        """
        joined = LIBRARY.join(Blocks.of(blocks), checkpoint, self.parts)
        positions = positions_in_order(self.kind, self.state)
        if positions == sorted(positions):
            assert joined == self.state
        else:
            assert collections.Counter(content(self.kind, joined)) == collections.Counter(
                content(self.kind, self.state)
            )
        target = self.plan.target
        status = self._load_status(blocks, checkpoint)
        if self.like.state_set(target, joined):
            assert status == "KVF_OK"
        else:
            assert status == "KVF_ERR_CACHE_FULL"
            self.like.seq_rm(target)
        assert states(self.ours) == states(self.like)
        for seq in (target, SEQ, target):
            assert self._logits(self.ours, seq) == self._logits(self.like, seq)
        assert states(self.ours) == states(self.like)

    def _load_status(self, blocks: list[Block], checkpoint: bytes | None) -> str:
        given = Blocks.of(blocks)
        try:
            job = self.attachment.load_blocks(
                self.plan.target, given, checkpoint, mode=self.plan.load_mode
            )
        except Failure as failure:
            return failure.name
        return job.wait()

    @staticmethod
    def _logits(context: Context, seq: int) -> bytes | None:
        """Returns the logits after one more token; None where llama.cpp refuses it."""
        try:
            return context.decode(seq, [7]).tobytes()
        except Refused:
            return None
