"""Decoding in both contexts."""

from __future__ import annotations

import collections
import contextlib

from support.devices import ON_GPU
from support.in_flight import at_node
from support.llama_reference import Refused
from support.random_walk.state import Unequal, WalkState


class Decoding:
    def __init__(self, walk: WalkState) -> None:
        self._walk = walk

    def decode(self) -> None:
        walk = self._walk
        seqs = walk.decodable()
        chosen = walk.random.sample(seqs, min(len(seqs), walk.random.choice((1, 1, 2, 3, 3))))
        turns = [seq for seq in chosen for _ in range(self._tokens(seq))]
        if walk.random.random() < 0.5:
            walk.random.shuffle(turns)
        if turns:
            self.decode_tokens(turns)

    def _tokens(self, seq: int) -> int:
        """Chooses how many tokens to decode."""
        walk = self._walk
        count = walk.random.choice((1, 1, 2, 8, 30, 50))
        # llama.cpp clears a recurrent cell by multiplying it by 0. After few tokens the state still
        # has the signs of these zeros.
        return max(count, 4) if walk.can.recurs and walk.like.pos_max(seq) < 0 else count

    def decode_tokens(self, turns: list[int]) -> None:
        walk = self._walk
        tokens = [walk.random.randrange(walk.like.model.vocabulary) for _ in turns]
        items = list(zip(turns, tokens, strict=True))
        walk.note(f"{dict(collections.Counter(turns))}")
        with contextlib.ExitStack() as stack:
            often = 0.8 if walk.shift_pending else 0.4
            if walk.in_flight and not ON_GPU and walk.random.random() < often:
                node = walk.random.choice((1, 2, 3, walk.random.randrange(1, 60)))
                walk.note(f"node {node}")
                stack.enter_context(at_node(walk.ours, node, walk.move_all))
            stack.enter_context(walk.not_for_ever())
            if not all(transfer.job.done for transfer in walk.in_flight.values()):
                walk.done["decode beside"] += 1
            try:
                ours = walk.ours.decode_batch(items)
            except Refused:
                ours = {}
        try:
            like = walk.like.decode_batch(items)
        except Refused:
            like = {}
        walk.shift_pending.clear()
        walk.copy_pending.clear()
        walk.copy_sources.clear()
        if not like:
            walk.note("refused")
        if ours.keys() != like.keys():
            raise Unequal(f"decoding was refused by one: {ours.keys()}, {like.keys()}")
        for seq in like:
            if ours[seq].tobytes() != like[seq].tobytes():
                raise Unequal(f"the logits of sequence {seq}")
