"""Sequences of which a part is empty, mostly a sliding window. libllama says that they are empty,
but they have cells in the layers that keep every token. And copies of a part of a hybrid sequence,
which share its recurrent cell as it is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import kvferry
import pytest
from support.block_histories import SEQ, SEQUENCES, TARGET
from support.block_reference import beginning_of, cut_by_format, rest_ends_at, rest_of
from support.blocks import MakePair, save_blocks, save_checkpoint
from support.c_interface import Blocks, BlocksAllowed, Engine, Failure, LoadMode, SaveMode
from support.devices import DEVICES
from support.empty_windows import (
    KEPT,
    copy_the_beginning,
    cut_off_the_end,
    lose_every_window,
    lose_the_recurrent_cell,
    lose_the_window,
)
from support.llama_reference import Context

RANGES = [(0, 3), (3, KEPT)]

without_a_window = pytest.mark.parametrize(
    ("kind", "cache", "history"),
    [
        *[("gemma3", cache, cut_off_the_end) for cache in ("flash", "transposed")],
        *[("gemma3", cache, copy_the_beginning) for cache in ("flash", "q8_0")],
        *[("hybrid-iswa", cache, copy_the_beginning) for cache in ("flash", "transposed")],
    ],
)


def states(context: Context) -> list[bytes]:
    return [context.state_get(seq) for seq in range(SEQUENCES)]


@without_a_window
@pytest.mark.parametrize("save", SaveMode)
@pytest.mark.parametrize("load", LoadMode)
def test_a_state_without_a_window_is_moved_as_by_llama_cpp(
    c_engine: Engine,
    pair: MakePair,
    kind: str,
    cache: str,
    history: Callable[[Context], None],
    save: SaveMode,
    load: LoadMode,
) -> None:
    ours, like = both = pair(kind, cache)
    state = lose_the_window(both, history)
    with c_engine.attach(ours.address) as attachment:
        assert attachment.size(SEQ) == len(state)
        buffer = ctypes.create_string_buffer(len(state))
        assert attachment.save(SEQ, buffer, mode=save).wait() == "KVF_OK"
        assert buffer.raw == state
        assert attachment.load(TARGET, buffer, mode=load).wait() == "KVF_OK"
        assert like.state_set(TARGET, state) == len(state)
        assert states(ours) == states(like)


@without_a_window
def test_blocks_of_a_sequence_without_a_window_are_saved(
    c_engine: Engine, pair: MakePair, kind: str, cache: str, history: Callable[[Context], None]
) -> None:
    ours, like = both = pair(kind, cache)
    state = lose_the_window(both, history)
    with c_engine.attach(ours.address) as attachment:
        blocks = save_blocks(attachment, RANGES)
        assert [block.state for block in blocks] == [
            cut_by_format(kind, state, *each) for each in RANGES
        ]
        [whole] = save_blocks(attachment, [(0, KEPT)])
        assert whole.state == beginning_of(kind, state)
    assert states(ours) == states(like)


@without_a_window
def test_a_sequence_without_a_window_has_no_checkpoint(
    c_engine: Engine, pair: MakePair, kind: str, cache: str, history: Callable[[Context], None]
) -> None:
    """It would be of no position, so that no load could use it."""
    ours, like = both = pair(kind, cache)
    state = lose_the_window(both, history)
    buffer = ctypes.create_string_buffer(len(state))
    with c_engine.attach(ours.address) as attachment:
        for call in (
            lambda: attachment.checkpoint_size(SEQ),
            lambda: attachment.save_checkpoint(SEQ, buffer),
        ):
            with pytest.raises(Failure, match="KVF_ERR_SEQUENCE_EMPTY"):
                call()
        blocks = save_blocks(attachment, [(0, KEPT)])
        with pytest.raises(Failure, match="the checkpoint is of position"):
            attachment.load_blocks(TARGET, Blocks.of(blocks), rest_of(kind, state))
    assert states(ours) == states(like)


@pytest.mark.parametrize("kind", ["hybrid", "hybrid-iswa"])
@pytest.mark.parametrize("cache", ["flash", "transposed"])
def test_blocks_alone_are_saved_where_the_recurrent_cell_is_gone(
    c_engine: Engine, pair: MakePair, kind: str, cache: str
) -> None:
    """A load would refuse the state, since it has cells for a part of the memory only."""
    ours, like = both = pair(kind, cache)
    state = lose_the_window(both, lose_the_recurrent_cell)
    buffer = ctypes.create_string_buffer(len(state))
    with c_engine.attach(ours.address) as attachment:
        for call in (
            lambda: attachment.save(SEQ, buffer),
            lambda: attachment.checkpoint_size(SEQ),
            lambda: attachment.save_checkpoint(SEQ, buffer),
        ):
            with pytest.raises(Failure, match="KVF_ERR_SEQUENCE_EMPTY"):
                call()
        [whole] = save_blocks(attachment, [(0, KEPT)])
        assert whole.state == beginning_of(kind, state)
        load = ctypes.create_string_buffer(state, len(state))
        with pytest.raises(Failure, match="for a part of the memory only"):
            attachment.load(TARGET, load)
    assert states(ours) == states(like)


@pytest.mark.parametrize("kind", ["hybrid", "hybrid-iswa"])
def test_a_copied_part_of_a_hybrid_sequence_has_a_checkpoint_of_another_position(
    c_engine: Engine, pair: MakePair, kind: str
) -> None:
    """llama_memory_seq_cp() shares the recurrent cell as it is. llama.cpp's states hold that too,
    and are saved and loaded so; but no blocks of the copy end where the checkpoint is."""
    ours, like = pair(kind, "flash")
    for context in (ours, like):
        context.decode(1, context.model.prompt(20))
        context.seq_cp(1, SEQ, 0, 12)
        context.decode(2, [7])
    state = like.state_get(SEQ)
    assert not rest_ends_at(kind, state, 11)
    with c_engine.attach(ours.address) as attachment:
        [block] = save_blocks(attachment, [(0, 12)])
        assert block.state == beginning_of(kind, state)
        checkpoint = save_checkpoint(attachment)
        assert checkpoint == rest_of(kind, state) == like.partial_state_get(SEQ)
        with pytest.raises(Failure, match="the checkpoint is of position"):
            attachment.load_blocks(TARGET, Blocks.of([block]), checkpoint)
        buffer = ctypes.create_string_buffer(len(state))
        assert attachment.save(SEQ, buffer).wait() == "KVF_OK"
        assert buffer.raw == state
        assert attachment.load(TARGET, buffer).wait() == "KVF_OK"
        assert like.state_set(TARGET, state) == len(state)
        # With all tokens of the sequence that it was copied from, the recurrent cell fits; a window
        # has lost tokens.
        whole = save_blocks(attachment, [(0, 20)], seq=1)
        if kind == "hybrid":
            assert attachment.load_blocks(3, Blocks.of(whole), checkpoint).wait() == "KVF_OK"
            assert like.state_set(3, like.state_get(1))
        else:
            with pytest.raises(Failure, match="the checkpoint is of position 11"):
                attachment.load_blocks(3, Blocks.of(whole), checkpoint)
    assert states(ours) == states(like)


# ---- No sequence of the context is whole, and kvferry has seen none before -----------------------


@without_a_window
def test_a_sequence_without_a_window_tells_what_blocks_need(
    c_engine: Engine, pair: MakePair, kind: str, cache: str, history: Callable[[Context], None]
) -> None:
    ours, like = both = pair(kind, cache)
    state = lose_every_window(both, history)
    with c_engine.attach(ours.address) as attachment:
        assert attachment.blocks_allowed()[0] == BlocksAllowed.WITH_CHECKPOINTS
        blocks = save_blocks(attachment, RANGES)
        assert [block.state for block in blocks] == [
            cut_by_format(kind, state, *each) for each in RANGES
        ]
        with pytest.raises(Failure, match="KVF_ERR_SEQUENCE_EMPTY"):
            attachment.checkpoint_size(SEQ)
    assert states(ours) == states(like)


@pytest.mark.parametrize("kind", ["hybrid", "hybrid-iswa"])
def test_a_sequence_without_its_recurrent_cell_tells_what_blocks_need(
    c_engine: Engine, pair: MakePair, kind: str
) -> None:
    ours, like = both = pair(kind, "flash")
    state = lose_every_window(both, lose_the_recurrent_cell)
    with c_engine.attach(ours.address) as attachment:
        assert attachment.blocks_allowed()[0] == BlocksAllowed.WITH_CHECKPOINTS
        [whole] = save_blocks(attachment, [(0, KEPT)])
        assert whole.state == beginning_of(kind, state)
    assert states(ours) == states(like)


@without_a_window
@pytest.mark.parametrize("target", [SEQ, TARGET])
def test_a_state_without_a_window_is_loaded_where_no_sequence_is_whole(
    c_engine: Engine,
    pair: MakePair,
    kind: str,
    cache: str,
    history: Callable[[Context], None],
    target: int,
) -> None:
    ours, like = both = pair(kind, cache)
    state = lose_every_window(both, history)
    with c_engine.attach(ours.address) as attachment:
        load = ctypes.create_string_buffer(state, len(state))
        assert attachment.load(target, load).wait() == "KVF_OK"
        assert like.state_set(target, state) == len(state)
        assert states(ours) == states(like)


@without_a_window
def test_whole_states_and_blocks_are_loaded_where_no_sequence_is_whole(
    c_engine: Engine, pair: MakePair, kind: str, cache: str, history: Callable[[Context], None]
) -> None:
    ours, like = both = pair(kind, cache)
    for context in both:
        context.decode(1, context.model.prompt(20))
    state = like.state_get(1)
    with c_engine.attach(ours.address) as attachment:
        blocks = save_blocks(attachment, [(0, 12), (12, 20)], seq=1)
        checkpoint = save_checkpoint(attachment, seq=1)
    for context in both:
        context.clear()
    lose_every_window(both, history)
    for by_blocks in (False, True):
        with c_engine.attach(ours.address) as attachment:
            load = ctypes.create_string_buffer(state, len(state))
            done = (
                attachment.load_blocks(TARGET, Blocks.of(blocks), checkpoint)
                if by_blocks
                else attachment.load(TARGET, load)
            )
            assert done.wait() == "KVF_OK"
            assert like.state_set(TARGET, state) == len(state)
            assert states(ours) == states(like)
            assert ours.decode(TARGET, [7]).tobytes() == like.decode(TARGET, [7]).tobytes()
        for context in both:
            context.seq_rm(TARGET)


@pytest.mark.parametrize("kind", ["gemma3", "hybrid-iswa"])
@pytest.mark.parametrize("as_blocks", [False, True])
def test_what_is_refused_leaves_a_sequence_as_it_was_where_none_is_whole(
    c_engine: Engine, pair: MakePair, kind: str, as_blocks: bool
) -> None:
    """The states are of a cache with the other layout of values: the one that libllama would have
    to be asked about."""
    other, _ = pair(kind, "transposed")
    other.decode(1, other.model.prompt(20))
    foreign = other.state_get(1)
    with c_engine.attach(other.address) as attachment:
        blocks = save_blocks(attachment, [(0, 20)], seq=1)
        checkpoint = save_checkpoint(attachment, seq=1)
    ours, like = both = pair(kind, "flash")
    lose_every_window(both, copy_the_beginning)
    load = ctypes.create_string_buffer(foreign, len(foreign))
    with c_engine.attach(ours.address) as attachment:
        for target in (SEQ, TARGET):
            with pytest.raises(Failure, match="KVF_ERR_STATE_MISMATCH"):
                _ = (
                    attachment.load_blocks(target, Blocks.of(blocks), checkpoint)
                    if as_blocks
                    else attachment.load(target, load)
                )
            assert states(ours) == states(like)


@pytest.mark.anyio
async def test_a_refused_load_leaves_a_sequence_without_a_window_as_it_was(pair: MakePair) -> None:
    ours, _ = both = pair("gemma3", "flash")
    lose_the_window(both, cut_off_the_end)
    before = states(ours)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(ours.address)
        with pytest.raises(kvferry.StateDamaged):
            await llama.load(before[1][:-1], SEQ)
        assert llama.load_outcome(SEQ) == "unchanged"
    assert states(ours) == before
