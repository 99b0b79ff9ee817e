"""Histories of a few random steps, as strategies of hypothesis.

They begin in an empty context of support/block_histories.py, and leave the sequences 4 and 5 empty.
A step that llama.cpp cannot do in the context as it is then does nothing. So each part of a history
is a history, too, and hypothesis can make one shorter that shows a fault.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable

from hypothesis import strategies as st

from support.abilities import Abilities
from support.block_histories import SEQ
from support.llama_reference import Context, Refused, llama

SEQUENCES = (SEQ, 1, 2, 3)
"""The sequences that are decoded, copied and removed."""


class Playing:
    """A context in which a history is played."""

    def __init__(self, context: Context, recurs: bool) -> None:
        self.context = context
        self.recurs = recurs
        self.shared: set[int] = set()
        """Sequences that may share cells with others."""

    def length(self, seq: int) -> int:
        return self.context.pos_max(seq) + 1

    def share(self, source: int, target: int) -> None:
        """Notes that one was copied to the other."""
        if self.context.options.kv_unified:
            self.shared |= {source, target}


Step = Callable[[Playing], None]


@dataclasses.dataclass(frozen=True)
class History:
    """Steps that are played in turn."""

    recurs: bool
    steps: tuple[Step, ...]

    def __call__(self, context: Context) -> None:
        playing = Playing(context, self.recurs)
        for step in self.steps:
            step(playing)


@dataclasses.dataclass(frozen=True)
class Decode:
    """Decodes so many tokens of each sequence, one sequence after the other or mixed."""

    counts: dict[int, int]
    mixed: bool
    seed: int

    def __call__(self, playing: Playing) -> None:
        chance = random.Random(self.seed)
        turns = []
        for seq, count in self.counts.items():
            # llama.cpp clears a recurrent cell by multiplying it by 0. After few tokens the state
            # still has the signs of these zeros.
            begins = playing.recurs and playing.length(seq) == 0
            turns += [seq] * (max(count, 4) if begins else count)
        if self.mixed:
            chance.shuffle(turns)
        vocabulary = playing.context.model.vocabulary
        with contextlib.suppress(Refused):  # the cache is full
            playing.context.decode_batch([(seq, chance.randrange(vocabulary)) for seq in turns])


@dataclasses.dataclass(frozen=True)
class DecodeImage:
    seq: int
    rows: int
    columns: int

    def __call__(self, playing: Playing) -> None:
        with contextlib.suppress(Refused):  # the cache is full
            playing.context.decode_image(self.seq, self.rows, self.columns)


@dataclasses.dataclass(frozen=True)
class Remove:
    seq: int

    def __call__(self, playing: Playing) -> None:
        playing.context.seq_rm(self.seq)
        playing.shared.discard(self.seq)


@dataclasses.dataclass(frozen=True)
class RemovePart:
    """Removes from a position on, so many positions or all."""

    seq: int
    begin: int
    count: int | None

    def __call__(self, playing: Playing) -> None:
        end = -1 if self.count is None else self.begin + self.count
        assert playing.context.seq_rm(self.seq, self.begin, end)


@dataclasses.dataclass(frozen=True)
class Copy:
    """Copies a sequence in place of another."""

    source: int
    target: int

    def __call__(self, playing: Playing) -> None:
        if self.source == self.target:
            return
        playing.context.seq_rm(self.target)
        playing.context.seq_cp(self.source, self.target)
        playing.share(self.source, self.target)


@dataclasses.dataclass(frozen=True)
class CopyPart:
    """Copies some positions of a sequence to another, beside what that has or in place of it."""

    source: int
    target: int
    begin: int
    count: int
    beside: bool

    def __call__(self, playing: Playing) -> None:
        if self.source == self.target:
            return
        if not self.beside:
            playing.context.seq_rm(self.target)
        end = self.begin + self.count
        playing.context.seq_cp(self.source, self.target, self.begin, end)
        playing.share(self.source, self.target)


@dataclasses.dataclass(frozen=True)
class Load:
    """Puts a sequence into other cells, and maybe into another sequence."""

    source: int
    target: int

    def __call__(self, playing: Playing) -> None:
        if playing.length(self.source) == 0:
            return
        state = playing.context.state_get(self.source)
        if not playing.context.state_set(self.target, state):  # the cache is full
            playing.context.seq_rm(self.target)
        playing.shared.discard(self.target)


@dataclasses.dataclass(frozen=True)
class Shift:
    """Removes the beginning, and moves the rest there. The next decode applies it to the keys."""

    seq: int
    count: int

    def __call__(self, playing: Playing) -> None:
        if self.seq in playing.shared or playing.length(self.seq) <= self.count:
            return
        assert playing.context.seq_rm(self.seq, 0, self.count)
        playing.context.seq_add(self.seq, self.count, -1, -self.count)


@dataclasses.dataclass(frozen=True)
class Divide:
    """Divides positions from one on by 2, so that they repeat."""

    seq: int
    begin: int

    def __call__(self, playing: Playing) -> None:
        if self.seq not in playing.shared:
            llama.llama_memory_seq_div(playing.context.memory, self.seq, self.begin, -1, 2)


def histories(kind: str, cache: str) -> st.SearchStrategy[History]:
    """Returns histories that llama.cpp can do with a kind of model and cache."""
    can = Abilities.of(kind, cache)
    seqs = st.sampled_from(SEQUENCES)
    positions = st.integers(0, 60)
    few, many = st.integers(1, 4), st.integers(1, 48)
    counts = st.dictionaries(seqs, few | many, min_size=1, max_size=3)
    decodes = st.builds(Decode, counts, st.booleans(), st.integers(0, 9))
    steps: list[st.SearchStrategy[Step]] = [
        decodes,
        decodes,
        st.builds(Remove, seqs),
        st.builds(Copy, seqs, seqs),
        st.builds(Load, seqs, seqs),
    ]
    if not can.recurs:
        steps.append(st.builds(RemovePart, seqs, positions, st.none() | st.integers(1, 9)))
    if not can.streams:
        steps.append(st.builds(CopyPart, seqs, seqs, positions, many, st.booleans()))
    if can.shifts:
        steps.append(st.builds(Shift, seqs, st.integers(1, 9)))
        steps.append(st.builds(Divide, seqs, positions))
    if kind == "qwen2vl":
        steps.append(st.builds(DecodeImage, seqs, few, few))
    first = st.builds(Decode, st.builds(lambda n: {SEQ: n, 1: 20}, many), st.booleans(), few)
    return st.builds(
        lambda begin, rest: History(can.recurs, (begin, *rest)),
        first,
        st.lists(st.one_of(steps), max_size=6),
    )
