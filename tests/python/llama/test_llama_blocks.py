"""Blocks and checkpoints hold what llama.cpp itself writes, and sequences that are loaded from them
are those that llama.cpp loads, bit for bit.
"""

from __future__ import annotations

import collections
import ctypes
import json
from collections.abc import Callable

import pytest
from kvferry.tools.synthetic import KINDS
from support.block_histories import HISTORIES, SEQ, SEQUENCES, TARGET, can
from support.block_reference import (
    PARTS_IN_BLOCKS,
    WITH_CHECKPOINTS,
    blocks_by_llama_cpp,
    content,
    cut_by_format,
    positions_in_order,
    rest_of,
)
from support.blocks import LIBRARY, MakePair, others, ranges_of, save_blocks, save_checkpoint
from support.c_interface import Blocks, BlocksAllowed, Engine, Failure
from support.like_contexts import CACHES, LATENT, OPAQUE
from support.llama_reference import Context

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
    ours, like = pair(kind, cache)
    for context in (ours, like):
        HISTORIES[history](context)
    before = others(ours)
    state = before[SEQ]
    assert like.state_get(SEQ) == state
    ranges = ranges_of(state, kind)
    parts = PARTS_IN_BLOCKS[kind]
    with c_engine.attach(ours.address) as attachment:
        blocks = save_blocks(attachment, ranges)
        expected = blocks_by_llama_cpp(like, kind, HISTORIES[history], ranges)
        assert [block.state for block in blocks] == expected
        checkpoint = None
        if kind in WITH_CHECKPOINTS:
            checkpoint = save_checkpoint(attachment)
            assert checkpoint == like.partial_state_get(SEQ) == rest_of(kind, state)
        # Nothing that was borrowed for it is left.
        assert others(ours) == before
        assert ours.pos_max(TARGET) == -1

        # The whole state is cut into the same, and joined to what has the same cells.
        cut = Blocks.with_room(ranges, max(len(block.state) for block in blocks))
        room = ctypes.create_string_buffer(max(1, len(checkpoint or b"")))
        assert LIBRARY.cut(state, cut, room, parts) == len(checkpoint or b"")
        assert cut.read() == blocks
        assert checkpoint in (None, room.raw)
        joined = LIBRARY.join(Blocks.of(blocks), checkpoint, parts)
        positions = positions_in_order(kind, state)
        if positions == sorted(positions):
            assert joined == state
        else:
            assert collections.Counter(content(kind, joined)) == collections.Counter(
                content(kind, state)
            )

        # A sequence that is loaded from them is that which llama.cpp loads from the joined state.
        assert attachment.load_blocks(TARGET, Blocks.of(blocks), checkpoint).wait() == "KVF_OK"
        assert like.state_set(TARGET, joined) == len(joined)
        assert ours.state_get(TARGET) == like.state_get(TARGET)
        assert others(ours) == others(like)
    for seq in (TARGET, SEQ, TARGET):
        assert ours.decode(seq, [7]).tobytes() == like.decode(seq, [7]).tobytes()
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
