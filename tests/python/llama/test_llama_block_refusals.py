"""Blocks and checkpoints that do not belong together are refused before libllama is called, and all
sequences are as they were.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
from support.block_histories import HISTORIES, SEQ, SEQUENCES, TARGET, options
from support.block_reference import PARTS_IN_BLOCKS, WITH_CHECKPOINTS, beginning_of
from support.blocks import LIBRARY, MakePair, save_blocks, save_checkpoint
from support.c_interface import Attachment, Block, Blocks, Engine, Failure
from support.like_contexts import MakeContext
from support.llama_reference import Context, Model
from support.state_fields import StateField, state_fields

RANGES = [(0, 16), (16, 32), (32, 40), (40, 45)]

ARGUMENT, DAMAGED = "KVF_ERR_INVALID_ARGUMENT", "KVF_ERR_STATE_DAMAGED"
MISMATCH, EMPTY = "KVF_ERR_STATE_MISMATCH", "KVF_ERR_SEQUENCE_EMPTY"

TWO_ATTENTIONS = ("gemma3", "hybrid-iswa", "deepseek32")
"""Kinds that keep the tokens of the block that is damaged in two sections."""

with_blocks = pytest.mark.parametrize("kind", PARTS_IN_BLOCKS)
with_checkpoints = pytest.mark.parametrize("kind", sorted(WITH_CHECKPOINTS))
caches = pytest.mark.parametrize("cache", ["flash", "transposed", "streams"])


class Scene:
    """A context with three sequences, and the blocks of one of them."""

    def __init__(self, attachment: Attachment, context: Context, kind: str) -> None:
        self.attachment = attachment
        self.context = context
        HISTORIES["in_turn"](context)
        self.blocks = save_blocks(attachment, RANGES)
        self.checkpoint = save_checkpoint(attachment) if kind in WITH_CHECKPOINTS else None
        self.load(self.blocks, self.checkpoint)
        self.before = self.states()

    def load(self, blocks: Sequence[Block], checkpoint: bytes | None) -> None:
        job = self.attachment.load_blocks(TARGET, Blocks.of(blocks), checkpoint)
        assert job.wait() == "KVF_OK"

    def states(self) -> list[bytes]:
        return [self.context.state_get(seq) for seq in range(SEQUENCES)]

    def calls(self) -> tuple[int, int]:
        described = json.loads(self.attachment.describe())
        return described["recorded_calls"], described["passed_calls"]

    def refuses(
        self, blocks: Sequence[Block], checkpoint: bytes | None, *statuses: str, what: object = ""
    ) -> None:
        calls = self.calls()
        with pytest.raises(Failure) as failure:
            self.load(blocks, checkpoint)
        assert failure.value.name in statuses, (what, failure.value)
        assert self.calls() == calls, what
        assert self.states() == self.before, what

    def refuses_call(self, call: Callable[[], object], status: str) -> None:
        with pytest.raises(Failure) as failure:
            call()
        assert failure.value.name == status, failure.value
        assert self.states() == self.before
        assert [seq for seq in range(SEQUENCES) if self.context.pos_max(seq) < 0] == [2, 5]


@contextmanager
def scene(engine: Engine, context: Context, kind: str) -> Iterator[Scene]:
    with engine.attach(context.address) as attachment:
        made = Scene(attachment, context, kind)
        yield made
        # Nothing is left that keeps whole blocks from being loaded.
        made.load(made.blocks, made.checkpoint)
        assert made.states() == made.before


@with_blocks
@caches
def test_blocks_that_do_not_follow_one_another_are_not_loaded(
    c_engine: Engine, pair: MakePair, kind: str, cache: str
) -> None:
    with scene(c_engine, pair(kind, cache)[0], kind) as s:
        first, second, third, last = s.blocks

        def placed(block: Block, begin: int, end: int) -> Block:
            return dataclasses.replace(block, begin=begin, end=end)

        for what, blocks, status in [
            ("missing", [first, third, last], ARGUMENT),
            ("doubled", [first, first, second, third, last], ARGUMENT),
            ("misordered", [first, third, second, last], ARGUMENT),
            ("reversed", [last, third, second, first], ARGUMENT),
            ("overlapping", [first, placed(second, 15, 32), third, last], ARGUMENT),
            ("without positions", [first, placed(second, 16, 16), third, last], ARGUMENT),
            ("backwards", [first, placed(second, 32, 16), third, last], ARGUMENT),
            ("negative", [placed(first, -16, 0)], ARGUMENT),
            ("one twice", [first, placed(first, 16, 32), third, last], DAMAGED),
            ("exchanged", [placed(second, 0, 16), placed(first, 16, 32), third, last], DAMAGED),
            ("too short", [placed(first, 0, 15), placed(second, 15, 32), third, last], DAMAGED),
            ("moved", [placed(first, 1, 17)], DAMAGED),
            ("none", [], ARGUMENT),
        ]:
            s.refuses(blocks, s.checkpoint, status, what=what)
        # No more than a sequence can have, whatever it is called.
        if s.checkpoint is None:
            s.refuses([dataclasses.replace(first, state=b"")], None, ARGUMENT)


@with_checkpoints
@caches
def test_a_checkpoint_that_does_not_belong_to_the_blocks_is_refused(
    c_engine: Engine, pair: MakePair, kind: str, cache: str
) -> None:
    context = pair(kind, cache)[0]
    with scene(c_engine, context, kind) as s:
        assert s.checkpoint
        s.refuses(s.blocks, None, ARGUMENT, what="missing")
        s.refuses([], s.checkpoint, ARGUMENT, what="alone")
        s.refuses(s.blocks[:-1], s.checkpoint, DAMAGED, what="of a later position")
        s.refuses(s.blocks, s.blocks[0].state, DAMAGED, MISMATCH, what="a block")
        s.refuses(s.blocks, context.state_get(SEQ), DAMAGED, MISMATCH, what="a whole state")
        for length in (1, 7, 8, 9, 12, 16, len(s.checkpoint) // 2, len(s.checkpoint) - 1):
            s.refuses(s.blocks, s.checkpoint[:length], DAMAGED, MISMATCH, what=length)
        s.refuses(s.blocks, s.checkpoint + b"\0", DAMAGED, MISMATCH, what="longer")
        context.decode(SEQ, [7])
        s.before = s.states()
        later = save_checkpoint(s.attachment)
        s.refuses(s.blocks, later, DAMAGED, what="of another position")


@pytest.mark.parametrize("kind", [kind for kind in PARTS_IN_BLOCKS if kind not in WITH_CHECKPOINTS])
def test_a_superfluous_checkpoint_is_refused(
    c_engine: Engine, pair: MakePair, make_context: MakeContext, kind: str
) -> None:
    hybrid = make_context("hybrid", **options("flash"))
    hybrid.decode(SEQ, hybrid.model.prompt(45))
    with scene(c_engine, pair(kind, "flash")[0], kind) as s:
        for checkpoint in (
            hybrid.partial_state_get(SEQ),
            s.blocks[-1].state,
            s.context.state_get(SEQ),
            bytes(100),
        ):
            s.refuses(s.blocks, checkpoint, ARGUMENT)


def test_blocks_are_refused_where_every_layer_is_recurrent(
    c_engine: Engine, pair: MakePair, make_context: MakeContext
) -> None:
    llama = make_context("llama", **options("flash"))
    llama.decode(SEQ, llama.model.prompt(16))
    block = Block(0, 16, llama.state_get(SEQ))
    context, _ = pair("mamba", "flash")
    context.decode_in_turn([0, TARGET], 20)
    before = [context.state_get(seq) for seq in range(SEQUENCES)]
    with c_engine.attach(context.address) as attachment:
        checkpoint = save_checkpoint(attachment)
        for blocks, given in (([block], None), ([block], checkpoint), ([], None)):
            with pytest.raises(Failure) as failure:
                attachment.load_blocks(TARGET, Blocks.of(blocks), given)
            assert failure.value.name in (ARGUMENT, "KVF_ERR_UNSUPPORTED")
            assert [context.state_get(seq) for seq in range(SEQUENCES)] == before


@with_blocks
def test_foreign_blocks_and_checkpoints_are_refused(
    c_engine: Engine,
    pair: MakePair,
    make_context: MakeContext,
    model: Callable[..., Model],
    kind: str,
) -> None:
    """Of a model of other sizes, of another type or layout of cache, and of another kind."""
    f32, transposed, streams = options("f32"), options("transposed"), options("streams")
    other_kind = "llama" if kind == "qwen2vl" else "qwen2vl"
    foreign = {
        "sizes": make_context(model(kind, geometry="other"), **options("flash")),
        "type": make_context(kind, **f32),
        "streams": make_context(kind, **streams),
        "kind": make_context(other_kind, **options("flash")),
    }
    if kind not in ("deepseek2", "deepseek32"):  # these have only keys
        foreign["layout"] = make_context(kind, **transposed)
    with scene(c_engine, pair(kind, "flash")[0], kind) as s:
        for name, context in foreign.items():
            HISTORIES["in_turn"](context)
            with c_engine.attach(context.address) as attachment:
                blocks = save_blocks(attachment, RANGES)
                checkpoint = None
                if s.checkpoint and name != "kind":
                    checkpoint = save_checkpoint(attachment)
            given = checkpoint or s.checkpoint
            s.refuses(blocks, given, MISMATCH, DAMAGED, what=name)
            mixed = [*s.blocks[:2], *blocks[2:]]
            # The blocks of this kind have no tensors: no layer keeps every token.
            if kind != "hybrid-iswa":
                s.refuses(mixed, s.checkpoint, MISMATCH, DAMAGED, what=f"mixed {name}")
            # The cells of recurrent layers are alike in all caches of a model.
            if checkpoint and (name == "sizes" or kind == "gemma3"):
                s.refuses(s.blocks, checkpoint, MISMATCH, DAMAGED, what=f"checkpoint {name}")


NUMBERS = [-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 100, 257, 2**31 - 1, 2**31]


def is_harmless(field: StateField) -> bool:
    """Whether a load ignores the field, or cannot know it: ids of sequences, and coordinates."""
    return field.name.endswith((".sequence", ".x", ".y", ".token"))


def is_another_cell(kind: str, block: Block, field: StateField) -> bool:
    """Whether the cell of this field could be in the block: positions may be missing, and repeat,
    unless another section holds the same token at another position.
    """
    moves = kind not in TWO_ATTENTIONS and field.name.endswith(".position")
    return moves and block.begin <= field.read(block.state) < block.end


def fields_of_block(kind: str, block: bytes, state: bytes) -> list[StateField]:
    """Returns the fields of a block, which with the rest of a state is a state."""
    rest = state[len(beginning_of(kind, state)) :]
    return [field for field in state_fields(kind, block + rest) if field.end <= len(block)]


@with_blocks
@pytest.mark.parametrize("cache", ["flash", "transposed-streams"])
def test_a_damaged_block_is_refused(
    c_engine: Engine, pair: MakePair, kind: str, cache: str
) -> None:
    context = pair(kind, cache)[0]
    with scene(c_engine, context, kind) as s:
        block = s.blocks[1]
        seen: dict[str, int] = {}
        for field in fields_of_block(kind, block.state, context.state_get(SEQ)):
            place = seen[field.name] = seen.get(field.name, -1) + 1
            if field.is_data or place not in (0, 7, 15):
                continue
            now = field.read(block.state)
            for number in [*NUMBERS, now - 1, now + 1, 2 * now]:
                damaged = dataclasses.replace(block, state=field.replaced(block.state, number))
                if damaged == block:
                    continue
                blocks = [s.blocks[0], damaged, *s.blocks[2:]]
                if is_harmless(field) or is_another_cell(kind, damaged, field):
                    s.load(blocks, s.checkpoint)
                    s.load(s.blocks, s.checkpoint)
                else:
                    what = (field, number)
                    s.refuses(blocks, s.checkpoint, DAMAGED, MISMATCH, what=what)
            cut = dataclasses.replace(block, state=block.state[: field.begin] or b"\0")
            s.refuses([s.blocks[0], cut, *s.blocks[2:]], s.checkpoint, DAMAGED, MISMATCH)
        for state in (block.state + b"\0", block.state + bytes(12), block.state * 2):
            longer = dataclasses.replace(block, state=state)
            s.refuses([s.blocks[0], longer, *s.blocks[2:]], s.checkpoint, DAMAGED, MISMATCH)


@with_checkpoints
def test_a_damaged_checkpoint_is_refused(c_engine: Engine, pair: MakePair, kind: str) -> None:
    context = pair(kind, "flash")[0]
    with scene(c_engine, context, kind) as s:
        assert s.checkpoint
        # The checkpoint is the end of the whole state.
        state = context.state_get(SEQ)
        frame = len(s.checkpoint) - (len(state) - len(beginning_of(kind, state)))
        distance = len(beginning_of(kind, state)) - frame
        seen: dict[str, int] = {}
        for field in state_fields(kind, state):
            if field.begin < distance + frame or field.is_data:
                continue
            place = seen[field.name] = seen.get(field.name, -1) + 1
            if place not in (0, 7, 15):
                continue
            moved = dataclasses.replace(field, begin=field.begin - distance)
            now = moved.read(s.checkpoint)
            for number in [*NUMBERS, now - 1, now + 1, 2 * now]:
                damaged = moved.replaced(s.checkpoint, number)
                if damaged == s.checkpoint or is_harmless(field):
                    continue
                # A window may lack tokens, but has none twice.
                if moved.name == "attention.cell.position" and 0 <= moved.read(damaged) < now:
                    continue
                s.refuses(s.blocks, damaged, DAMAGED, MISMATCH, what=(field, number))


@with_blocks
@caches
def test_saves_that_are_refused_leave_every_sequence_as_it_was(
    c_engine: Engine, pair: MakePair, kind: str, cache: str
) -> None:
    """Also the sequence that is borrowed for a save."""
    with scene(c_engine, pair(kind, cache)[0], kind) as s:
        size = s.attachment.block_size(16)

        def save(ranges: Sequence[tuple[int, int]], room: int = size, seq: int = SEQ) -> Blocks:
            blocks = Blocks.with_room(ranges, room)
            s.refuses_call(lambda: s.attachment.save_blocks(seq, blocks), statuses[-1])
            return blocks

        statuses = [ARGUMENT]
        for ranges in ([(4, 4)], [(8, 4)], [(-1, 4)], [(0, 8), (7, 9)], [(8, 9), (0, 8)], []):
            save(ranges)
        statuses.append(EMPTY)
        for ranges in ([(45, 50)], [(0, 8), (45, 46)], [(1000, 1001)]):
            save(ranges)
        save([(0, 8)], seq=2)
        statuses.append("KVF_ERR_BUFFER_TOO_SMALL")
        small = save(RANGES, size - 1)
        assert small.sizes == [len(block.state) for block in s.blocks]
        statuses.append("KVF_ERR_SEQUENCE_RANGE")
        save([(0, 8)], seq=SEQUENCES)
        save([(0, 8)], seq=-1)


def test_buffers_that_overlap_are_refused(c_engine: Engine, pair: MakePair) -> None:
    with scene(c_engine, pair("llama", "flash")[0], "llama") as s:
        size = s.attachment.block_size(16)
        buffer = ctypes.create_string_buffer(2 * size)
        for distance in (0, 1, size - 1):
            blocks = Blocks.with_room([(0, 16), (16, 32)], size)
            for index, one in enumerate(blocks.array):
                one.buffer = ctypes.addressof(buffer) + index * distance
            s.refuses_call(lambda blocks=blocks: s.attachment.save_blocks(SEQ, blocks), ARGUMENT)


def test_blocks_that_are_too_many_for_the_cache_are_refused(
    c_engine: Engine, make_context: MakeContext
) -> None:
    """The cells that are left are too few: libllama refuses, and the sequence is empty."""
    context = make_context("llama", n_ctx=256)
    context.decode(0, context.model.prompt(140))
    before = context.state_get(0)
    with c_engine.attach(context.address) as attachment:
        blocks = save_blocks(attachment, [(0, 70), (70, 140)])
        with pytest.raises(Failure) as failure:
            attachment.load_blocks(1, Blocks.of(blocks))
        assert failure.value.name == "KVF_ERR_CACHE_FULL"
        assert context.pos_max(1) == -1
        assert context.state_get(0) == before
        assert attachment.load_blocks(0, Blocks.of(blocks)).wait() == "KVF_OK"
        assert context.state_get(0) == before


# ---- On plain memory -----------------------------------------------------------------------------


@with_blocks
def test_what_cannot_be_cut_or_joined_is_refused(
    c_engine: Engine, pair: MakePair, kind: str
) -> None:
    parts = PARTS_IN_BLOCKS[kind]
    context = pair(kind, "flash")[0]
    with scene(c_engine, context, kind) as s:
        state = context.state_get(SEQ)
        assert LIBRARY.join(Blocks.of(s.blocks), s.checkpoint, parts) == state

        def refused(status: str, call: Callable[[], object]) -> None:
            with pytest.raises(Failure) as failure:
                call()
            assert failure.value.name == status, failure.value

        def cut(state: bytes, ranges: list[tuple[int, int]]) -> Blocks:
            blocks = Blocks.sized_only(ranges)
            LIBRARY.cut(state, blocks, parts=parts)
            return blocks

        assert cut(state, RANGES).sizes == [len(block.state) for block in s.blocks]
        refused(DAMAGED, lambda: cut(state[:-1], RANGES))
        refused(DAMAGED, lambda: cut(b"", RANGES))
        refused(EMPTY, lambda: cut(state, [(45, 46)]))
        refused(ARGUMENT, lambda: cut(state, [(16, 32), (0, 16)]))
        small = Blocks.with_room(RANGES, len(s.blocks[0].state) - 1)
        refused("KVF_ERR_BUFFER_TOO_SMALL", lambda: LIBRARY.cut(state, small, parts=parts))
        assert all(not any(buffer.raw) for buffer in small.buffers)

        def join(blocks: Sequence[Block], room: int = -1) -> bytes:
            return LIBRARY.join(Blocks.of(blocks), s.checkpoint, parts, room)

        refused("KVF_ERR_BUFFER_TOO_SMALL", lambda: join(s.blocks, len(state) - 1))
        refused(ARGUMENT, lambda: join([]))
        refused(ARGUMENT, lambda: join([s.blocks[0], s.blocks[2]]))
        refused(ARGUMENT, lambda: join([s.blocks[1], s.blocks[0]]))
        truncated = dataclasses.replace(s.blocks[0], state=s.blocks[0].state[:-1])
        refused(DAMAGED, lambda: join([truncated, *s.blocks[1:]]))
        elsewhere = dataclasses.replace(s.blocks[0], begin=16, end=32)
        refused(DAMAGED, lambda: join([elsewhere, *s.blocks[2:]]))
