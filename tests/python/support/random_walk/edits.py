"""Edits of sequences in both contexts."""

from __future__ import annotations

from support.llama_reference import llama
from support.random_walk.caches import SEQUENCES
from support.random_walk.decoding import Decoding
from support.random_walk.state import WalkState
from support.random_walk.transfers import Transfers


class Edits:
    def __init__(self, walk: WalkState, transfers: Transfers, decoding: Decoding) -> None:
        self._walk = walk
        self._transfers = transfers
        self._decoding = decoding

    def remove(self) -> None:
        walk = self._walk
        seq = walk.choose(walk.resting())
        if seq is None:
            return
        walk.note(f"{seq}")
        if walk.attachments and walk.random.random() < 0.5:
            walk.random.choice(walk.attachments).remove(seq)
        else:
            walk.ours.seq_rm(seq)
        walk.like.seq_rm(seq)
        walk.forget_edits(seq)

    def remove_a_part(self) -> None:
        walk = self._walk
        seq = walk.choose(walk.holding_cells(walk.resting()))
        if seq is None:
            return
        start = walk.random.randrange(walk.like.pos_max(seq) + 1)
        stop = walk.random.choice((-1, -1, start + 5))
        walk.note(f"{seq} [{start}, {stop})")
        for context in walk.both():
            assert context.seq_rm(seq, start, stop)

    def copy(self) -> None:
        walk = self._walk

        def may_be_read(seq: int) -> bool:
            return seq not in walk.in_flight or walk.in_flight[seq].direction == "save"

        source = walk.choose(walk.holding_cells([seq for seq in SEQUENCES if may_be_read(seq)]))
        target = walk.choose([seq for seq in walk.resting() if seq != source])
        if source is None or target is None:
            return
        walk.note(f"{source} onto {target}")
        for context in walk.both():
            context.seq_rm(target)
            context.seq_cp(source, target)
        walk.forget_edits(target)
        if walk.can.streams:
            walk.copy_pending.add(target)
            walk.copy_sources.add(source)
        else:
            walk.shared |= {source, target}
        if source in walk.shift_pending:
            walk.shift_pending.add(target)

    def _alone(self) -> list[int]:
        """The sequences that share no cells with others."""
        walk = self._walk
        return [seq for seq in walk.holding_cells(walk.resting()) if seq not in walk.shared]

    def shift(self) -> None:
        walk = self._walk
        seq = walk.choose(self._alone())
        if seq is None:
            return
        removed = walk.random.choice((1, 4, 8))
        walk.note(f"{seq} by {-removed}")
        for context in walk.both():
            assert context.seq_rm(seq, 0, removed)
            context.seq_add(seq, removed, -1, -removed)
        walk.shift_pending.add(seq)
        # So that a load often meets a pending shift.
        if walk.random.random() < 0.7:
            walk.note("then load")
            self._transfers.load()
            self._decoding.decode()

    def divide(self) -> None:
        walk = self._walk
        seq = walk.choose(self._alone())
        if seq is None:
            return
        start = walk.random.randrange(walk.like.pos_max(seq) + 1)
        walk.note(f"{seq} from {start}")
        for context in walk.both():
            llama.llama_memory_seq_div(context.memory, seq, start, -1, 2)
        walk.shift_pending.add(seq)

    def keep(self) -> None:
        walk = self._walk
        seq = walk.choose(list(SEQUENCES))
        if seq is None or any(other != seq for other in walk.in_flight):
            return
        walk.note(f"{seq}")
        for context in walk.both():
            context.seq_keep(seq)
        walk.shared.clear()
        walk.shift_pending &= {seq}

    def clear(self) -> None:
        walk = self._walk
        if walk.in_flight:
            return
        for context in walk.both():
            context.clear()
        walk.shared.clear()
        walk.shift_pending.clear()
