"""Blocks and checkpoints hold what llama.cpp itself writes, and sequences that are loaded from them
are those that llama.cpp loads, bit for bit.
"""

from __future__ import annotations

import ctypes
import itertools
import json
from collections.abc import Callable

import pytest
from kvferry.tools.synthetic import KINDS
from support.block_comparison import Comparison, Plan
from support.block_histories import HISTORIES, SEQ, SEQUENCES, TARGET, can, options
from support.block_reference import (
    PARTS_IN_BLOCKS,
    WITH_CHECKPOINTS,
    blocks_by_llama_cpp,
    cut_by_format,
    positions_in_order,
    rest_of,
)
from support.blocks import LIBRARY, MakePair, ranges_of, save_blocks, save_checkpoint
from support.c_interface import Blocks, BlocksAllowed, Engine, Failure, LoadMode, SaveMode
from support.like_contexts import CACHES, LATENT, OPAQUE, RECURRENT, MakeContext
from support.llama_reference import Context
from support.sequence_edits import EDITS, can_edit, copy_a_part

KINDS_AND_CACHES = [
    (kind, cache)
    for kind in KINDS
    for cache in CACHES
    if not (kind in LATENT and cache == "q8_0-keys-transposed")
]
KINDS_WITH_BLOCKS = [(kind, cache) for kind, cache in KINDS_AND_CACHES if kind in PARTS_IN_BLOCKS]


# ---- What is allowed -----------------------------------------------------------------------------


def allowed(kind: str) -> BlocksAllowed:
    if kind in OPAQUE:
        return BlocksAllowed.NONE
    if kind == "mamba":
        return BlocksAllowed.CHECKPOINTS_ALONE
    if kind in WITH_CHECKPOINTS:
        return BlocksAllowed.WITH_CHECKPOINTS
    return BlocksAllowed.ALONE


NAMES = {
    BlocksAllowed.UNSEEN: "unseen",
    BlocksAllowed.NONE: "none",
    BlocksAllowed.CHECKPOINTS_ALONE: "checkpoints",
    BlocksAllowed.WITH_CHECKPOINTS: "blocks+checkpoints",
    BlocksAllowed.ALONE: "blocks",
}


@pytest.mark.parametrize(("kind", "cache"), KINDS_AND_CACHES)
def test_a_cache_says_whether_it_allows_blocks(
    c_engine: Engine, pair: MakePair, kind: str, cache: str
) -> None:
    ours, _ = pair(kind, cache)
    with c_engine.attach(ours.address) as attachment:
        ours.decode(1, ours.model.prompt(20))
        says, why = attachment.blocks_allowed()
        assert says == allowed(kind)
        assert (why == "") == (says == BlocksAllowed.ALONE)
        described = json.loads(attachment.describe())
        assert described["blocks"] == NAMES[says]
        assert described["why"] == why
        assert described["parts_in_blocks"] == PARTS_IN_BLOCKS.get(kind, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_cache_does_not_allow_is_refused(
    c_engine: Engine, pair: MakePair, kind: str
) -> None:
    ours, _ = pair(kind, "flash")
    ours.decode_in_turn([0, 1], 20)
    before = [ours.state_get(seq) for seq in range(SEQUENCES)]
    buffer = ctypes.create_string_buffer(1 << 20)
    with c_engine.attach(ours.address) as attachment:
        says, _ = attachment.blocks_allowed()
        refused: list[Callable[[], object]] = []
        if says in (BlocksAllowed.NONE, BlocksAllowed.CHECKPOINTS_ALONE):
            refused += [
                lambda: attachment.block_size(1),
                lambda: attachment.save_blocks(0, Blocks.with_room([(0, 10)], 1 << 20)),
            ]
        if says in (BlocksAllowed.NONE, BlocksAllowed.ALONE):
            refused += [
                lambda: attachment.checkpoint_size(0),
                lambda: attachment.save_checkpoint(0, buffer),
            ]
        for call in refused:
            with pytest.raises(Failure) as failure:
                call()
            assert failure.value.name == "KVF_ERR_UNSUPPORTED"
    assert [ours.state_get(seq) for seq in range(SEQUENCES)] == before


# ---- Against llama.cpp ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "cache", "history"),
    [
        (kind, cache, history)
        for kind, cache in KINDS_WITH_BLOCKS
        for history in HISTORIES
        if can(history, kind, cache)
    ],
)
def test_blocks_are_saved_and_loaded_as_by_llama_cpp(
    c_engine: Engine,
    pair: MakePair,
    kind: str,
    cache: str,
    history: str,
) -> None:
    both = pair(kind, cache)
    for context in both:
        HISTORIES[history](context)
    plan = Plan(ranges_of(both[0].state_get(SEQ), kind))
    with c_engine.attach(both[0].address) as attachment:
        Comparison(attachment, both, kind, HISTORIES[history], plan).run()


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("cache", ["flash", "streams"])
@pytest.mark.parametrize("kind", PARTS_IN_BLOCKS)
def test_no_edited_sequence_has_blocks_that_are_taken_for_damaged(
    c_engine: Engine, pair: MakePair, kind: str, cache: str, edit: Callable[[Context], None]
) -> None:
    """Positions may be missing, and after a division they repeat."""
    if not can_edit(edit, kind):
        pytest.skip("llama.cpp ends the process")
    ours, like = pair(kind, cache)
    for context in (ours, like):
        context.decode(0, context.model.prompt(70))
        context.decode(1, context.model.prompt(40, seed=1))
        edit(context)
    if ours.pos_max(SEQ) < 0:
        return
    state = ours.state_get(SEQ)
    ranges = ranges_of(state, kind)
    with c_engine.attach(ours.address) as attachment:
        blocks = save_blocks(attachment, ranges, room=attachment.block_size(70))
        for block in blocks:
            assert block.state == cut_by_format(kind, state, block.begin, block.end)
        checkpoint = save_checkpoint(attachment) if kind in WITH_CHECKPOINTS else None
        assert checkpoint in (None, rest_of(kind, state))
        if edit is copy_a_part and kind in RECURRENT and cache == "flash":
            # The recurrent cell is now that of sequence 1, which ends at another position.
            with pytest.raises(Failure, match="the checkpoint is of position 39"):
                attachment.load_blocks(TARGET, Blocks.of(blocks), checkpoint)
            return
        joined = LIBRARY.join(Blocks.of(blocks), checkpoint, PARTS_IN_BLOCKS[kind])
        assert attachment.load_blocks(TARGET, Blocks.of(blocks), checkpoint).wait() == "KVF_OK"
        assert like.state_set(TARGET, joined) == len(joined)
        assert ours.state_get(TARGET) == like.state_get(TARGET)


def lose_the_window(context: Context) -> None:
    """Sequence 1 takes cells of a sliding window that sequence 0 no longer sees."""
    context.decode(SEQ, context.model.prompt(150))
    for seed in range(4):
        context.decode(1, context.model.prompt(64, seed=seed))


@pytest.mark.parametrize("kind", ["gemma3", "hybrid-iswa"])
@pytest.mark.parametrize("cache", ["flash", "transposed", "streams"])
def test_blocks_are_saved_though_the_window_has_lost_their_tokens(
    c_engine: Engine, pair: MakePair, kind: str, cache: str
) -> None:
    ours, like = pair(kind, cache)
    lose_the_window(ours)
    lose_the_window(like)
    ranges = [(0, 16), (40, 41), (60, 90)]
    with c_engine.attach(ours.address) as attachment:
        # One at a time: none has anything to do with a token that is still in the window.
        blocks = [block for each in ranges for block in save_blocks(attachment, [each])]
    assert [block.state for block in blocks] == blocks_by_llama_cpp(
        like, kind, lose_the_window, ranges
    )


def test_a_sequence_of_which_only_the_window_is_empty_is_not_borrowed(
    c_engine: Engine, pair: MakePair
) -> None:
    """libllama says that it is empty, but it has cells in the layers that keep every token."""
    ours, _ = pair("gemma3", "flash")
    last = SEQUENCES - 1
    ours.decode(last, ours.model.prompt(150))
    for seed in range(2):
        ours.decode(SEQ, ours.model.prompt(64, seed=seed))
    assert ours.seq_rm(last, 5, -1)
    assert ours.pos_max(last) == -1
    for seq in range(1, last):
        ours.decode(seq, [7])
    before = [ours.state_get(seq) for seq in range(SEQUENCES)]
    assert len(before[last]) > 5 * ours.model.n_swa
    with c_engine.attach(ours.address) as attachment:
        [block] = save_blocks(attachment, [(0, 16)])
        assert block.state == cut_by_format("gemma3", before[SEQ], 0, 16)
    assert [ours.state_get(seq) for seq in range(SEQUENCES)] == before


def images(context: Context) -> None:
    """Text, an image, text, and an image that is the end, in cells beside those of a text."""
    context.decode_in_turn([SEQ, 1], 10)
    context.decode_image(SEQ, rows=3, columns=4)
    context.decode_in_turn([SEQ, 1], 10, seed=5)
    context.decode_image(SEQ, rows=2, columns=2)


@pytest.mark.parametrize("cache", ["flash", "transposed", "streams"])
def test_patches_of_an_image_share_a_position_and_a_block(
    c_engine: Engine, pair: MakePair, cache: str
) -> None:
    ours, like = pair("qwen2vl", cache)
    images(ours)
    images(like)
    state = ours.state_get(SEQ)
    positions = positions_in_order("qwen2vl", state)
    assert positions.count(10) == 12
    ends = [0, 6, 11, 16, max(positions) + 1]
    ranges = list(itertools.pairwise(ends))
    with c_engine.attach(ours.address) as attachment:
        blocks = save_blocks(attachment, ranges, room=attachment.block_size(32))
        assert [block.state for block in blocks] == blocks_by_llama_cpp(
            like, "qwen2vl", images, ranges
        )
        assert attachment.load_blocks(TARGET, Blocks.of(blocks)).wait() == "KVF_OK"
        assert like.state_set(TARGET, state) == len(state)
        assert ours.state_get(TARGET) == like.state_get(TARGET)
    assert ours.decode(TARGET, [7]).tobytes() == like.decode(TARGET, [7]).tobytes()


# ---- Which blocks, and where ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", PARTS_IN_BLOCKS)
@pytest.mark.parametrize("cache", ["flash", "transposed", "streams"])
def test_blocks_need_not_follow_one_another(
    c_engine: Engine, pair: MakePair, kind: str, cache: str
) -> None:
    ours, _ = pair(kind, cache)
    HISTORIES["in_turn"](ours)
    state = ours.state_get(SEQ)
    with c_engine.attach(ours.address) as attachment:
        for ranges in ([(44, 45)], [(0, 1), (7, 9), (9, 30), (41, 45)], [(3, 1000)]):
            blocks = save_blocks(attachment, ranges, room=attachment.block_size(64))
            for block in blocks:
                assert block.state == cut_by_format(kind, state, block.begin, block.end)
                cells = min(block.end, 45) - block.begin
                assert len(block.state) == attachment.block_size(cells)


@pytest.mark.parametrize("kind", [*PARTS_IN_BLOCKS])
@pytest.mark.parametrize("cache", ["flash", "transposed"])
def test_blocks_are_saved_where_no_sequence_can_be_borrowed(
    c_engine: Engine, pair: MakePair, kind: str, cache: str
) -> None:
    ours, _ = pair(kind, cache)
    ours.decode_in_turn(range(SEQUENCES), 20)
    before = [ours.state_get(seq) for seq in range(SEQUENCES)]
    with c_engine.attach(ours.address) as attachment:
        for seq in (0, SEQUENCES - 1):
            blocks = save_blocks(attachment, [(0, 5), (16, 20)], seq)
            for block in blocks:
                assert block.state == cut_by_format(kind, before[seq], block.begin, block.end)
    assert [ours.state_get(seq) for seq in range(SEQUENCES)] == before


@pytest.mark.parametrize("cache", ["flash", "transposed"])
def test_few_tokens_of_a_long_sequence_are_listed_alone(
    c_engine: Engine, pair: MakePair, cache: str
) -> None:
    ours, _ = pair("llama", cache)
    ours.decode_in_turn([SEQ, 1], 100)

    def recorded_calls() -> int:
        return int(json.loads(attachment.describe())["recorded_calls"])

    with c_engine.attach(ours.address) as attachment:
        buffer = ctypes.create_string_buffer(attachment.size(SEQ))
        start = recorded_calls()
        assert attachment.save(SEQ, buffer).wait() == "KVF_OK"
        whole = recorded_calls() - start
        save_blocks(attachment, [(90, 100)])
        assert recorded_calls() - start - whole <= whole / 10 + 8


@pytest.mark.parametrize("kind", PARTS_IN_BLOCKS)
@pytest.mark.parametrize("cache", ["flash", "transposed", "streams"])
@pytest.mark.parametrize("into", ["fresh", "own", "taken"])
def test_blocks_are_loaded_into_any_context_and_sequence(
    c_engine: Engine, pair: MakePair, make_context: MakeContext, kind: str, cache: str, into: str
) -> None:
    """A new context, which has never had a cell; the sequence itself; one that holds others."""
    ours, like = pair(kind, cache)
    source = make_context(kind, **options(cache)) if into == "fresh" else ours
    for context in {source, ours, like} if into != "fresh" else {source}:
        HISTORIES["at_random"](context)
    target = {"fresh": TARGET, "own": SEQ, "taken": 1}[into]
    state = source.state_get(SEQ)
    ranges = ranges_of(state, kind)
    with c_engine.attach(source.address) as attachment:
        blocks = save_blocks(attachment, ranges)
        checkpoint = save_checkpoint(attachment) if kind in WITH_CHECKPOINTS else None
    with c_engine.attach(ours.address) as attachment:
        assert attachment.load_blocks(target, Blocks.of(blocks), checkpoint).wait() == "KVF_OK"
        assert like.state_set(target, state) == len(state)
        assert [ours.state_get(seq) for seq in range(SEQUENCES)] == [
            like.state_get(seq) for seq in range(SEQUENCES)
        ]
    assert ours.decode(target, [7]).tobytes() == like.decode(target, [7]).tobytes()


@pytest.mark.parametrize("kind", PARTS_IN_BLOCKS)
@pytest.mark.parametrize("save", [SaveMode.IN_PLACE, SaveMode.SNAPSHOT])
@pytest.mark.parametrize("load", [LoadMode.IN_PLACE, LoadMode.AHEAD])
def test_all_modes_and_priorities_move_the_same_bytes(
    c_engine: Engine, pair: MakePair, kind: str, save: SaveMode, load: LoadMode
) -> None:
    ours, like = pair(kind, "flash")
    for context in (ours, like):
        HISTORIES["at_random"](context)
    state = ours.state_get(SEQ)
    with c_engine.attach(ours.address) as attachment:
        checkpoint = save_checkpoint(attachment) if kind in WITH_CHECKPOINTS else None
        blocks = Blocks.with_room(ranges_of(state, kind), attachment.block_size(16))
        assert attachment.save_blocks(SEQ, blocks, mode=save, priority=1).wait() == "KVF_OK"
        for block in blocks.read():
            assert block.state == cut_by_format(kind, state, block.begin, block.end)
        whole = Blocks.of(blocks.read())
        job = attachment.load_blocks(TARGET, whole, checkpoint, mode=load, priority=1)
        assert job.wait() == "KVF_OK"
        like.state_set(TARGET, state)
        assert ours.state_get(TARGET) == like.state_get(TARGET)


# ---- Checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "cache"),
    [each for each in KINDS_AND_CACHES if each[0] in {*WITH_CHECKPOINTS, "mamba"}],
)
def test_a_checkpoint_stays_what_llama_cpp_writes_while_decoding_goes_on(
    c_engine: Engine, pair: MakePair, kind: str, cache: str
) -> None:
    ours, like = pair(kind, cache)
    for context in (ours, like):
        HISTORIES["in_turn"](context)
    state = like.state_get(SEQ)
    expected = like.partial_state_get(SEQ)
    with c_engine.attach(ours.address) as attachment:
        buffer = ctypes.create_string_buffer(attachment.checkpoint_size(SEQ))
        job = attachment.save_checkpoint(SEQ, buffer)
        for context in (ours, like):
            context.decode_in_turn([0, 1, 3], 40, seed=9)
        assert job.wait() == "KVF_OK"
        assert buffer.raw == expected
        assert ours.state_get(SEQ) == like.state_get(SEQ)

        # With the blocks of then, whose tokens are still there, the sequence is as it was.
        blocks = []
        if kind in PARTS_IN_BLOCKS:
            blocks = save_blocks(attachment, ranges_of(state, kind))
        assert attachment.load_blocks(TARGET, Blocks.of(blocks), buffer.raw).wait() == "KVF_OK"
        assert like.state_set(TARGET, state) == len(state)
        assert ours.state_get(TARGET) == like.state_get(TARGET)
    assert ours.decode(TARGET, [7]).tobytes() == like.decode(TARGET, [7]).tobytes()
