"""Loads states that are composed of blocks and a checkpoint, most of which are damaged or do not
belong together. test_llama_block_damage.py runs this program in a process of its own, because a
damaged state that reaches libllama may end the process:

    python -m support.damage_blocks MODEL KIND OPTIONS FIRST COUNT

OPTIONS are ContextOptions as JSON. Prints the number of each state before it is tried. If the
process ends, the last number is the state to look at: run again with it as FIRST, and 1 as COUNT.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import random
import resource
import sys
from collections.abc import Callable

from support.block_reference import (
    PARTS_IN_BLOCKS,
    WITH_CHECKPOINTS,
    beginning_of,
    cut_by_format,
    frame_of,
    positions_in_order,
    rest_of,
)
from support.blocks import LIBRARY
from support.c_interface import Block, Blocks, Devices, Engine, Failure
from support.damage_states import damaged
from support.devices import ON_GPU
from support.llama_reference import Context, ContextOptions, Model
from support.state_fields import LAST_POSITION, StateField, state_fields

MEMORY = 3 << 30
"""Bytes of address space that a process may have."""

SOURCES = (0, 1)
TARGET = 2
TOKENS = 40
"""Of each sequence that is cut: more than a sliding window has."""

REFUSALS = {
    "KVF_ERR_INVALID_ARGUMENT",
    "KVF_ERR_STATE_DAMAGED",
    "KVF_ERR_STATE_MISMATCH",
    "KVF_ERR_UNSUPPORTED",
}
"""Statuses of states that libllama is not given."""

ENDS = ([16, 32], [1, 2], [], [5, 10, 15, 20, 39])
"""Where sequences are cut."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A block, or a checkpoint at its ``end``; and the fields of its bytes before any damage."""

    begin: int
    end: int
    state: bytes
    fields: tuple[StateField, ...]

    @property
    def block(self) -> Block:
        return Block(self.begin, self.end, self.state)

    def with_state(self, state: bytes) -> Part:
        # `damaged` needs two bytes, so that it can cut a part off.
        return dataclasses.replace(self, state=state.ljust(2, b"\0"))

    def moved(self, distance: int) -> Part:
        """Returns this part with all its positions moved, in its bytes too."""
        state = self.state
        for field in self.fields:
            if field.name.endswith(".cell.position"):
                state = field.replaced(state, field.read(state) + distance)
        return dataclasses.replace(
            self, begin=self.begin + distance, end=self.end + distance, state=state
        )


Composed = tuple[list[Part], Part | None]
"""Blocks, and a checkpoint where there is one."""


def cut(kind: str, state: bytes, ends: list[int]) -> Composed:
    """Cuts a state at these positions, without kvferry."""
    first, last = min(positions_in_order(kind, state)), max(positions_in_order(kind, state))
    fields = state_fields(kind, state)
    rest = rest_of(kind, state)
    blocks = []
    for begin, end in itertools.pairwise([first, *(end for end in ends if end <= last), last + 1]):
        block = cut_by_format(kind, state, begin, end)
        of_block = state_fields(kind, block + rest[len(frame_of(rest)) :])
        own = tuple(field for field in of_block if field.end <= len(block))
        blocks.append(Part(begin, end, block, own))
    if kind not in WITH_CHECKPOINTS:
        return blocks, None
    frame = len(frame_of(state))
    distance = len(beginning_of(kind, state)) - frame
    own = tuple(
        dataclasses.replace(field, begin=field.begin - distance)
        for field in fields
        if field.begin >= distance + frame
    )
    return blocks, Part(last + 1, last + 1, rest, own)


# ---- What is damaged -----------------------------------------------------------------------------


class Composer:
    """Composes states by numbers: the same number gives the same state."""

    def __init__(self, own: list[Composed], foreign: list[Composed]) -> None:
        self._own = own
        self._all = own + foreign
        self._changes: list[Callable[[random.Random, list[Part], Part | None], Composed]] = [
            self._damage_a_block,
            self._damage_a_block,
            self._damage_a_block,
            self._damage_the_checkpoint,
            self._exchange_a_block,
            self._exchange_the_checkpoint,
            self._reorder,
            self._name_other_positions,
            self._move_all,
        ]

    def compose(self, number: int) -> Composed:
        chance = random.Random(number)
        blocks, checkpoint = chance.choice(self._own)
        for _ in range(chance.choice([1, 1, 1, 2, 3])):
            blocks, checkpoint = chance.choice(self._changes)(chance, list(blocks), checkpoint)
        return blocks, checkpoint

    def _damage_a_block(
        self, chance: random.Random, blocks: list[Part], checkpoint: Part | None
    ) -> Composed:
        if blocks:
            index = chance.randrange(len(blocks))
            one = blocks[index]
            blocks[index] = one.with_state(damaged(one.state, list(one.fields), chance))
        return blocks, checkpoint

    def _damage_the_checkpoint(
        self, chance: random.Random, blocks: list[Part], checkpoint: Part | None
    ) -> Composed:
        if checkpoint is None:
            return self._damage_a_block(chance, blocks, None)
        state = damaged(checkpoint.state, list(checkpoint.fields), chance)
        return blocks, checkpoint.with_state(state)

    def _exchange_a_block(
        self, chance: random.Random, blocks: list[Part], checkpoint: Part | None
    ) -> Composed:
        """Puts a block of another sequence or cache in place of one. Half of the time the new block
        is named by the positions of the old one."""
        other = chance.choice(chance.choice(self._all)[0])
        if blocks:
            index = chance.randrange(len(blocks))
            if chance.random() < 0.5:
                there = blocks[index]
                other = dataclasses.replace(other, begin=there.begin, end=there.end)
            blocks[index] = other
        return blocks, checkpoint

    def _exchange_the_checkpoint(
        self, chance: random.Random, blocks: list[Part], checkpoint: Part | None
    ) -> Composed:
        others = [one for _, one in self._all if one]
        some = chance.choice(self._all)[0]
        return blocks, chance.choice([None, *others, *others, some[0], some[-1]])

    def _reorder(
        self, chance: random.Random, blocks: list[Part], checkpoint: Part | None
    ) -> Composed:
        what = chance.randrange(3)
        if what == 0:
            chance.shuffle(blocks)
        elif what == 1 and blocks:
            del blocks[chance.randrange(len(blocks))]
        elif blocks:
            blocks.insert(chance.randrange(len(blocks) + 1), chance.choice(blocks))
        return blocks, checkpoint

    def _name_other_positions(
        self, chance: random.Random, blocks: list[Part], checkpoint: Part | None
    ) -> Composed:
        """Names blocks by more or fewer positions than they hold."""
        if blocks:
            index = chance.randrange(len(blocks))
            by = chance.choice([-1, 1, 1, 2, 100, 2**31 - 1 - blocks[index].end])
            blocks[index] = dataclasses.replace(blocks[index], end=blocks[index].end + by)
            if index + 1 < len(blocks) and chance.random() < 0.7:
                after = blocks[index + 1]
                blocks[index + 1] = dataclasses.replace(after, begin=blocks[index].end)
        return blocks, checkpoint

    def _move_all(
        self, chance: random.Random, blocks: list[Part], checkpoint: Part | None
    ) -> Composed:
        """Moves all to other positions, as after a shift: some near the last one that is allowed,
        some beyond."""
        far = LAST_POSITION - TOKENS
        distance = chance.choice([-1, 1, 7, 1000, far, far + 1, far + 2, 2**31 - 1 - TOKENS])
        most = max((block.end for block in blocks), default=0)
        least = min((block.begin for block in blocks), default=0)
        if most + distance > 2**31 - 1 or least + distance < -(2**31):
            return blocks, checkpoint
        moved = [block.moved(distance) for block in blocks]
        return moved, checkpoint.moved(distance) if checkpoint else None


# ---- What becomes of it --------------------------------------------------------------------------


class Loads:
    """Loads into one context, and sees that it is usable afterwards. Use it in a ``with``
    statement."""

    def __init__(self, engine: Engine, context: Context) -> None:
        self.context = context
        self._engine = engine
        self._attachment = engine.attach(context.address)
        self._empty = context.state_size(TARGET)
        self.outcomes: collections.Counter[str] = collections.Counter()

    def __enter__(self) -> Loads:
        return self

    def __exit__(self, *_: object) -> None:
        self._attachment.detach()

    def attach_anew(self) -> None:
        """Attaches anew, so that nothing is known from earlier loads."""
        self._attachment.detach()
        self._attachment = self._engine.attach(self.context.address)

    def _recorded_calls(self) -> int:
        return int(json.loads(self._attachment.describe())["recorded_calls"])

    def load(self, composed: Composed, *, seen: bool) -> None:
        """Loads what is composed. ``seen``: kvferry knows the format of the cache, so that it asks
        libllama nothing about a state that it refuses.
        """
        blocks, checkpoint = composed
        before, calls = self.context.state_get(TARGET), self._recorded_calls()
        given = Blocks.of([part.block for part in blocks])
        bytes_of_checkpoint = checkpoint.state if checkpoint else None
        try:
            status = self._attachment.load_blocks(TARGET, given, bytes_of_checkpoint).wait()
        except Failure as failure:
            status = failure.name
        self.outcomes[status] += 1
        if status == "KVF_OK":
            self._check_usable()
        elif status == "KVF_ERR_CACHE_FULL":
            # kvferry counts the cells of the context, libllama those that are free.
            assert self.context.state_get(TARGET) in (before, b"") or self._is_empty(), status
        else:
            assert status in REFUSALS, status
            assert not seen or self._recorded_calls() == calls, "libllama was called"
            assert self.context.state_get(TARGET) == before, "the sequence is another one"

    def _check_usable(self) -> None:
        assert self.context.pos_max(TARGET) >= 0
        self.context.decode(TARGET, [7])
        self.remove()

    def remove(self) -> None:
        self._attachment.remove(TARGET)
        assert self._is_empty(), "cells are left"

    def _is_empty(self) -> bool:
        size = self.context.state_size(TARGET)
        return self.context.pos_max(TARGET) == -1 and size == self._empty

    def check_every_cell(self, good: Composed, taken: int) -> None:
        """Fills the cache; in a unified cache, `taken` cells belong to other sequences."""
        self.load(good, seen=False)
        options = self.context.options
        unified = options.kv_unified
        cells = options.n_ctx // (1 if unified else options.n_seq_max) - (taken if unified else 0)
        self.context.decode(TARGET, self.context.model.prompt(cells))
        self.remove()


def sources(model: Model, kind: str, options: ContextOptions) -> list[Composed]:
    """Returns sequences of a cache, cut in several ways."""
    composed = []
    with model.context(options) as context:
        context.decode_in_turn(SOURCES, TOKENS)
        for seq in SOURCES:
            state = context.state_get(seq)
            composed += [cut(kind, state, ends) for ends in ENDS]
        # One token more, as if the checkpoint or the last block were older.
        context.decode(SOURCES[0], [7])
        composed.append(cut(kind, context.state_get(SOURCES[0]), ENDS[0]))
    return composed


def main() -> None:
    if not ON_GPU:  # the driver of a GPU reserves far more addresses than it has memory
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    path, kind, text, first, count = sys.argv[1:]
    options = ContextOptions(**json.loads(text))
    assert kind in PARTS_IN_BLOCKS
    model = Model(path)
    # Of a cache with the other layout of values.
    other = dataclasses.replace(options, flash_attention=not options.flash_attention)
    if options.type_v != ContextOptions.type_v:  # quantised values need flash attention
        other = ContextOptions(n_ctx=options.n_ctx, kv_unified=options.kv_unified)
    own = sources(model, kind, options)
    composer = Composer(own, sources(model, kind, other))
    context, fresh = model.context(options), model.context(options)
    context.decode_in_turn(SOURCES, TOKENS)
    others = [context.state_get(seq) for seq in SOURCES]
    with (
        # An engine for the host reaches no cache in the memory of a GPU.
        LIBRARY.engine(Devices.CUDA if ON_GPU else Devices.HOST, copy_threads=1) as engine,
        Loads(engine, context) as into,
        Loads(engine, fresh) as anew,
    ):
        into.load(own[0], seen=False)  # from here on kvferry knows the format of the cache
        for number in range(int(first), int(first) + int(count)):
            print(number, flush=True)
            composed = composer.compose(number)
            over_something = number % 3 == 0
            if over_something:
                context.decode(TARGET, [7, 8])
            into.load(composed, seen=True)
            if over_something:
                into.remove()
            if number % 8 == 0:
                anew.attach_anew()
                anew.load(composed, seen=False)
            if number % 500 == 0:
                assert [context.state_get(seq) for seq in SOURCES] == others
                into.check_every_cell(own[0], taken=len(SOURCES) * TOKENS)
        assert [context.state_get(seq) for seq in SOURCES] == others
        into.check_every_cell(own[0], taken=len(SOURCES) * TOKENS)
        anew.check_every_cell(own[0], taken=0)
    print(json.dumps(into.outcomes + anew.outcomes), flush=True)


if __name__ == "__main__":
    main()
