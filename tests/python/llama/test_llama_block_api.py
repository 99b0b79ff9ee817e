"""Blocks and checkpoints through Llama and sync.Llama: arguments, results, ownership, errors.

What blocks consist of, for every kind of cache, is compared elsewhere.
"""

from __future__ import annotations

import gc
import random
import weakref
from pathlib import Path

import anyio
import kvferry
import numpy as np
import pytest
from kvferry import BlocksAllowed, cut_state, join_blocks, sync
from kvferry._bridge.attachment import Attachment
from support.devices import DEVICES
from support.event_loops import anyio_backend  # noqa: F401
from support.like_contexts import MakeContext
from support.llama_reference import Context

pytestmark = pytest.mark.anyio

TOKENS = 200
BLOCK = 64
KINDS = ["llama", "gemma3", "mamba", "hybrid"]


@pytest.fixture
def context(make_context: MakeContext) -> Context:
    """A context with a prompt in sequence 0; sequences 1 to 3 are empty."""
    return prompted(make_context, "llama")


def prompted(make_context: MakeContext, kind: str) -> Context:
    context = make_context(kind, n_ctx=1024)
    context.decode(0, context.model.prompt(TOKENS))
    return context


async def saved(
    llama: kvferry.Llama, seq: int = 0
) -> tuple[list[kvferry.Block], kvferry.Checkpoint | None]:
    """Saves what the cache allows."""
    allowed, _ = await llama.blocks_allowed_async()
    blocks = await llama.save_blocks(seq, tokens=BLOCK) if allowed.blocks else []
    return blocks, await llama.save_checkpoint(seq) if allowed.checkpoints else None


# ---- The plain case ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_a_sequence_comes_back_from_what_its_cache_allows(
    make_context: MakeContext, kind: str
) -> None:
    context, like = prompted(make_context, kind), prompted(make_context, kind)
    state = context.state_get(0)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        blocks, checkpoint = await saved(llama)
        await llama.remove(0)
        await llama.load_blocks(blocks, 0, checkpoint=checkpoint)
        assert llama.load_outcome(0) == "loaded"
    like.seq_rm(0)
    like.state_set(0, state)
    assert context.state_get(0) == like.state_get(0)
    assert np.array_equal(context.decode(0, [7]), like.decode(0, [7]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_comes_back_without_an_event_loop(make_context: MakeContext, kind: str) -> None:
    context = prompted(make_context, kind)
    state = context.state_get(0)
    with sync.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        allowed, _ = llama.blocks_allowed()
        blocks = llama.save_blocks(0, tokens=BLOCK) if allowed.blocks else []
        checkpoint = llama.save_checkpoint(0) if allowed.checkpoints else None
        llama.remove(0)
        llama.load_blocks(blocks, 0, checkpoint=checkpoint)
    assert context.state_get(0) == state


async def test_blocks_know_where_they_are_and_what_they_are_of(context: Context) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        blocks = await llama.save_blocks(0, tokens=BLOCK)
        assert [(block.begin, block.end) for block in blocks] == [
            (0, 64),
            (64, 128),
            (128, 192),
            (192, 200),
        ]
        for block in blocks:
            assert block.fingerprint == llama.fingerprint
            assert block.nbytes == llama.block_size(block.end - block.begin)
            assert block.completion is not None
            assert block.completion.bytes == sum(each.nbytes for each in blocks)
        assert (block.key, block.parent, block.llm) == (None, None, None)
        (part,) = await llama.save_blocks(0, 100, 130)
        assert (part.begin, part.end) == (100, 130)
        assert await llama.block_size_async(30) == part.nbytes
        again = await llama.save_blocks(0, 64, 192, tokens=BLOCK, priority="urgent")
        assert [each.to_bytes() for each in again] == [each.to_bytes() for each in blocks[1:3]]


async def test_a_block_of_plain_attention_is_a_state(context: Context) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        (block,) = await llama.save_blocks(0, tokens=TOKENS)
        assert block.to_bytes() == context.state_get(0)
        await llama.load(block, 1)
        assert context.pos_max(1) == TOKENS - 1
        other = kvferry.Block.from_bytes(block.to_bytes(), 0, TOKENS, fingerprint="another")
        with pytest.raises(kvferry.StateMismatch, match="another"):
            await llama.load(other, 1)


async def test_a_checkpoint_knows_its_position(make_context: MakeContext) -> None:
    context = prompted(make_context, "gemma3")
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        checkpoint = await llama.save_checkpoint(0, key=b"prompt")
        assert (checkpoint.position, checkpoint.key) == (TOKENS - 1, b"prompt")
        assert checkpoint.fingerprint == llama.fingerprint
        assert checkpoint.nbytes == llama.checkpoint_size(0)
        await llama.run(context.decode, 0, [1, 2, 3])
        later = await llama.save_checkpoint(0)
        assert later.position == TOKENS + 2
        assert await llama.checkpoint_size_async(0) == later.nbytes


async def test_saves_and_loads_may_be_started_and_awaited_later(make_context: MakeContext) -> None:
    context = prompted(make_context, "gemma3")
    state = context.state_get(0)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        save = await llama.start_save_blocks(0, tokens=BLOCK, mode="snapshot")
        checkpoint_save = await llama.start_save_checkpoint(0)
        await llama.run(context.seq_rm, 0)
        blocks, checkpoint = await save.wait(), await checkpoint_save.wait()
        load = await llama.start_load_blocks(blocks, 0, checkpoint=checkpoint, priority="urgent")
        await load.wait()
        assert save.done
        assert load.done
    assert context.state_get(0) == state


async def test_blocks_are_saved_beside_decoding(context: Context) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        expected = [block.to_bytes() for block in await llama.save_blocks(0, 0, 192, tokens=BLOCK)]
        async with anyio.create_task_group() as tasks:

            async def decode() -> None:
                for token in range(30):
                    await llama.run(context.decode, 0, [token])
                    await llama.run(context.decode, 1, [token])

            tasks.start_soon(decode)
            for _ in range(10):
                blocks = await llama.save_blocks(0, 0, 192, tokens=BLOCK)
                assert [block.to_bytes() for block in blocks] == expected


# ---- What a cache allows -------------------------------------------------------------------------


async def test_what_a_cache_allows_is_asked(make_context: MakeContext) -> None:
    expected = {
        "llama": BlocksAllowed.ALONE,
        "gemma3": BlocksAllowed.WITH_CHECKPOINTS,
        "mamba": BlocksAllowed.CHECKPOINTS_ALONE,
        "hybrid": BlocksAllowed.WITH_CHECKPOINTS,
    }
    async with kvferry.Engine(DEVICES) as engine:
        for kind, allowed in expected.items():
            context = prompted(make_context, kind)
            llama = engine.attach(context.address)
            await llama.size_async(0)
            answer, reason = llama.blocks_allowed()
            assert answer is allowed
            assert (await llama.blocks_allowed_async()) == (answer, reason)
            assert (reason == "") == (allowed is BlocksAllowed.ALONE)
            assert llama.describe()["blocks"] == answer.value
            with sync.Engine(DEVICES) as blocking:
                assert blocking.attach(context.address).blocks_allowed() == (answer, reason)


async def test_what_a_cache_does_not_allow_is_refused(make_context: MakeContext) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(prompted(make_context, "llama").address)
        with pytest.raises(kvferry.KvferryError) as refused:
            await llama.save_checkpoint(0)
        assert refused.value.name == "KVF_ERR_UNSUPPORTED"
        llama = engine.attach(prompted(make_context, "mamba").address)
        with pytest.raises(kvferry.KvferryError) as refused:
            await llama.save_blocks(0)
        assert refused.value.name == "KVF_ERR_UNSUPPORTED"


# ---- Memory --------------------------------------------------------------------------------------


async def test_blocks_are_saved_into_the_callers_memory(context: Context) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        expected = [block.to_bytes() for block in await llama.save_blocks(0, tokens=100)]
        size = llama.block_size(100)
        memory = np.zeros((2, size + 50), np.uint8)
        blocks = await llama.save_blocks(0, tokens=100, into=list(memory))
        assert [block.to_bytes() for block in blocks] == expected
        assert [block.numpy().ctypes.data for block in blocks] == [
            row.ctypes.data for row in memory
        ]
        assert not memory[:, size:].any()
        with pytest.raises(kvferry.Busy, match="a Block that has not been closed has"):
            await llama.save_blocks(0, tokens=100, into=list(memory))
        for block in blocks:
            block.close()
        with pytest.raises(kvferry.BufferTooSmall):
            await llama.save_blocks(0, tokens=100, into=list(memory[:, : size - 1]))
        with pytest.raises(kvferry.Busy):  # the same memory twice
            await llama.save_blocks(0, tokens=100, into=[memory[0], memory[0]])
        with pytest.raises(ValueError, match="into has 2 items for 4 blocks"):
            await llama.save_blocks(0, tokens=BLOCK, into=list(memory))
        with sync.Engine(DEVICES) as blocking:
            again = blocking.attach(context.address).save_blocks(0, tokens=100, into=list(memory))
            assert [block.to_bytes() for block in again] == expected


async def test_blocks_that_are_larger_than_expected_get_larger_buffers(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where positions repeat, only the save itself tells how large blocks are."""
    with sync.Engine(DEVICES) as blocking:
        llama = blocking.attach(context.address)
        expected = [block.to_bytes() for block in llama.save_blocks(0, tokens=BLOCK)]
        monkeypatch.setattr(Attachment, "measure_block", lambda *_: 100)
        assert [block.to_bytes() for block in llama.save_blocks(0, tokens=BLOCK)] == expected
    async with kvferry.Engine(DEVICES) as engine:
        llama_async = engine.attach(context.address)
        blocks = await llama_async.save_blocks(0, tokens=BLOCK)
        assert [block.to_bytes() for block in blocks] == expected


async def test_each_block_has_a_buffer_of_the_pool_which_it_frees(context: Context) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)

        def free() -> int:
            gc.collect()
            pool = engine.describe()["pool"]
            return int(pool["mapped"] - pool["free"])

        assert free() == 0
        blocks = await llama.save_blocks(0, tokens=BLOCK)
        taken = free()
        assert taken >= sum(block.nbytes for block in blocks)
        blocks[0].close()
        assert free() < taken
        views = [block.numpy() for block in blocks[1:]]
        kept = [view.tobytes() for view in views]
        del blocks
        assert free() > 0
        assert [view.tobytes() for view in views] == kept
        del views
        assert free() == 0


async def test_a_transfer_that_is_kept_keeps_no_memory(context: Context) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        save = await llama.start_save_blocks(0, tokens=BLOCK)
        blocks = await save.wait()
        load = await llama.start_load_blocks(blocks, 1)
        await load.wait()
        references = [weakref.ref(block) for block in blocks]
        del blocks, save
        gc.collect()
        assert [reference() for reference in references] == [None] * 4
        assert load.done


async def test_blocks_outlive_their_engine(context: Context) -> None:
    state = context.state_get(0)
    async with kvferry.Engine(DEVICES) as engine:
        blocks = await engine.attach(context.address).save_blocks(0, tokens=BLOCK)
    context.seq_rm(0)
    async with kvferry.Engine(DEVICES) as engine:
        await engine.attach(context.address).load_blocks(blocks, 0)
    assert context.state_get(0) == state


# ---- Cancelling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
async def test_a_cancelled_load_is_whole_or_empty_and_a_cancelled_save_leaves_nothing(
    make_context: MakeContext, kind: str
) -> None:
    context = prompted(make_context, kind)
    state = context.state_get(0)
    pace = random.Random(0)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        blocks, checkpoint = await saved(llama)
        empty = llama.size(1)
        for _ in range(100):
            with anyio.move_on_after(pace.random() * 0.002) as scope:
                await llama.load_blocks(blocks, 1, checkpoint=checkpoint)
            whole = (empty, len(state)) if scope.cancelled_caught else (len(state),)
            assert llama.size(1) in whole
            into = [bytearray(block.nbytes) for block in blocks]
            with anyio.move_on_after(pace.random() * 0.002):
                await llama.save_blocks(0, tokens=BLOCK, into=into)
            gc.collect()
            for memory in into:
                memory.append(0)  # raises BufferError if a job still uses it
        assert all(block.jobs == 0 for block in blocks)
        for block in blocks:
            block.close()
        assert [context.pos_max(seq) for seq in (2, 3)] == [-1, -1]
    assert context.state_get(0) == state


async def test_a_cancelled_transfer_says_so(context: Context) -> None:
    state = context.state_get(0)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        transfer = await llama.start_save_blocks(0, tokens=BLOCK)
        transfer.cancel()
        try:
            blocks = await transfer.wait()
        except kvferry.TransferCancelled:
            blocks = await llama.save_blocks(0, tokens=BLOCK)
        load = await llama.start_load_blocks(blocks, 1)
        load.cancel()
        try:
            await load.wait()
        except kvferry.TransferCancelled:
            assert llama.load_outcome(1) == "empty"
            assert context.pos_max(1) == -1
    assert context.state_get(0) == state


async def test_a_task_that_has_been_cancelled_submits_nothing(context: Context) -> None:
    async with kvferry.Engine(DEVICES, trace=True) as engine:
        llama = engine.attach(context.address)
        blocks = await llama.save_blocks(0, tokens=BLOCK)
        engine.trace()
        with anyio.CancelScope() as scope:
            scope.cancel()
            await llama.save_blocks(0)
        assert scope.cancelled_caught
        with anyio.CancelScope() as scope:
            scope.cancel()
            await llama.load_blocks(blocks, 1)
        assert scope.cancelled_caught
        assert engine.trace() == []
        assert llama.load_outcome(1) == "unchanged"


async def test_a_closed_engine_refuses(context: Context) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        blocks = await llama.save_blocks(0)
        await llama.detach()
        with pytest.raises(kvferry.EngineClosed):
            await llama.save_blocks(0)
        with pytest.raises(kvferry.EngineClosed):
            await llama.load_blocks(blocks, 0)
        with pytest.raises(kvferry.EngineClosed):
            await llama.save_checkpoint(0)
        with pytest.raises(kvferry.EngineClosed):
            llama.block_size()
        with pytest.raises(kvferry.EngineClosed):
            llama.blocks_allowed()


async def test_a_context_that_has_been_freed_is_noticed(make_context: MakeContext) -> None:
    context = prompted(make_context, "gemma3")
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        blocks, checkpoint = await saved(llama)
        await llama.run(context.close)
        with pytest.raises(kvferry.ContextFreed):
            await llama.save_blocks(0)
        with pytest.raises(kvferry.ContextFreed):
            await llama.save_checkpoint(0)
        with pytest.raises(kvferry.ContextFreed):
            await llama.load_blocks(blocks, 0, checkpoint=checkpoint)


# ---- What is refused, and leaves the sequence as it was ------------------------------------------


async def test_wrong_arguments_are_refused(context: Context) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        with pytest.raises(ValueError, match="no position between begin, 5, and end, 5"):
            await llama.save_blocks(0, 5, 5)
        with pytest.raises(ValueError, match="tokens is 0"):
            await llama.save_blocks(0, tokens=0)
        with pytest.raises(ValueError, match="begin is -1"):
            await llama.save_blocks(0, -1, 5)
        with pytest.raises(TypeError, match="end is an integer"):
            await llama.save_blocks(0, 0, 5.0)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="a key is bytes"):
            await llama.save_blocks(0, keys=["a"], tokens=TOKENS)  # type: ignore[list-item]
        with pytest.raises(ValueError, match="keys has 1 items for 2 blocks"):
            await llama.save_blocks(0, keys=[b"a"], tokens=100)
        with pytest.raises(TypeError, match="blocks are Block objects, not bytes"):
            await llama.load_blocks([b"data"], 0)  # type: ignore[list-item]
        with pytest.raises(TypeError, match="checkpoint is a Checkpoint, not bytes"):
            await llama.load_blocks([], 0, checkpoint=b"data")  # type: ignore[arg-type]
        for seq in (4, 1 << 20, -1):
            with pytest.raises(kvferry.SequenceRange):
                await llama.save_blocks(seq)
            with pytest.raises(kvferry.SequenceRange):
                await llama.save_blocks(seq, 0, 5)
        with pytest.raises(kvferry.SequenceEmpty):
            await llama.save_blocks(1)
        with pytest.raises(kvferry.SequenceEmpty):
            await llama.save_blocks(0, TOKENS)
        with pytest.raises(kvferry.SequenceEmpty):
            await llama.save_blocks(0, TOKENS, TOKENS + 5)


async def test_what_is_not_one_conversation_is_refused(make_context: MakeContext) -> None:
    context = prompted(make_context, "gemma3")
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        keys = [b"a", b"b", b"c", b"d"]
        blocks = await llama.save_blocks(0, tokens=BLOCK, keys=keys, parent=b"start")
        assert [(block.parent, block.key) for block in blocks] == [
            (b"start", b"a"),
            (b"a", b"b"),
            (b"b", b"c"),
            (b"c", b"d"),
        ]
        right = await llama.save_checkpoint(0, key=b"d")
        other = await llama.save_checkpoint(0, key=b"e")
        unnamed = await llama.save_checkpoint(0)
        before = context.state_get(0)
        with pytest.raises(kvferry.StateMismatch, match="of another conversation"):
            await llama.load_blocks(blocks, 0, checkpoint=other)
        blocks[2].parent = b"x"
        with pytest.raises(kvferry.StateMismatch, match="at 128 does not follow the one at 64"):
            await llama.load_blocks(blocks, 0, checkpoint=right)
        assert llama.load_outcome(0) == "unchanged"
        assert context.state_get(0) == before
        blocks[2].parent = None
        for checkpoint in (right, unnamed):
            await llama.load_blocks(blocks, 0, checkpoint=checkpoint)
    assert context.state_get(0) == before


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
async def test_what_cannot_be_loaded_leaves_the_sequence(
    make_context: MakeContext, kind: str
) -> None:
    context = prompted(make_context, kind)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        blocks, checkpoint = await saved(llama)
        await llama.run(context.decode, 1, [1, 2, 3])
        before = context.state_get(1)
        data = blocks[1].to_bytes()

        def instead(block: kvferry.Block) -> list[kvferry.Block]:
            return [blocks[0], block, *blocks[2:]]

        make = kvferry.Block.from_bytes
        refused: list[tuple[list[kvferry.Block], type[Exception]]] = [
            ([], ValueError),
            ([blocks[0], *blocks[2:]], ValueError),  # a gap
            ([blocks[1], blocks[0], *blocks[2:]], ValueError),
            ([*blocks, blocks[-1]], ValueError),
            (instead(make(data, 64, 128, fingerprint="another")), kvferry.StateMismatch),
            (instead(make(data[:-1], 64, 128)), kvferry.StateDamaged),
            (instead(make(data[:50], 64, 128)), kvferry.StateDamaged),
            (instead(make(blocks[0].to_bytes(), 64, 128)), kvferry.StateDamaged),
        ]
        for given, error in refused:
            with pytest.raises(error):
                await llama.load_blocks(given, 1, checkpoint=checkpoint)
            assert llama.load_outcome(1) == "unchanged"
            assert context.state_get(1) == before
        with sync.Engine(DEVICES) as blocking:
            attached = blocking.attach(context.address)
            for given, error in refused:
                with pytest.raises(error):
                    attached.load_blocks(given, 1, checkpoint=checkpoint)
                assert context.state_get(1) == before
        blocks[2].close()
        with pytest.raises(kvferry.KvferryError, match="this Block has been closed"):
            await llama.load_blocks(blocks, 1, checkpoint=checkpoint)
        assert context.state_get(1) == before


async def test_a_checkpoint_must_be_there_and_belong(make_context: MakeContext) -> None:
    context = prompted(make_context, "gemma3")
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        blocks, checkpoint = await saved(llama)
        assert checkpoint is not None
        before = context.state_get(0)
        make = kvferry.Checkpoint.from_bytes
        for given, error in [
            (None, ValueError),
            (make(checkpoint.to_bytes(), TOKENS - 1, fingerprint="x"), kvferry.StateMismatch),
            (make(checkpoint.to_bytes()[:-1], TOKENS - 1), kvferry.StateDamaged),
        ]:
            with pytest.raises(error):
                await llama.load_blocks(blocks, 0, checkpoint=given)
            assert context.state_get(0) == before
        with pytest.raises(kvferry.StateDamaged):  # of a later position
            await llama.load_blocks(blocks[:-1], 0, checkpoint=checkpoint)
        checkpoint.close()
        with pytest.raises(kvferry.KvferryError, match="this Checkpoint has been closed"):
            await llama.load_blocks(blocks, 0, checkpoint=checkpoint)
        assert context.state_get(0) == before


# ---- Files, and plain memory ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma3", "hybrid"])
async def test_files_bring_a_sequence_back(
    make_context: MakeContext, kind: str, tmp_path: Path
) -> None:
    context = prompted(make_context, kind)
    state = context.state_get(0)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        blocks, checkpoint = await saved(llama)
        for index, block in enumerate(blocks):
            await block.write(tmp_path / str(index))
        read = [await kvferry.Block.read(tmp_path / str(index)) for index in range(len(blocks))]
        last = None
        if checkpoint is not None:
            await checkpoint.write(tmp_path / "checkpoint")
            last = await kvferry.Checkpoint.read(tmp_path / "checkpoint")
        await llama.remove(0)
        await llama.load_blocks(read, 0, checkpoint=last)
    assert context.state_get(0) == state


@pytest.mark.parametrize("kind", ["llama", "gemma3", "hybrid"])
async def test_a_state_is_cut_into_blocks_and_joined_again(
    make_context: MakeContext, kind: str
) -> None:
    context = prompted(make_context, kind)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        blocks, checkpoint = await saved(llama)
        snapshot = await llama.save(0)
        parts = llama.describe()["parts_in_blocks"]
        spans = [(block.begin, block.end) for block in blocks]

        cut, last = cut_state(snapshot, spans, parts_in_blocks=parts)
        assert [block.to_bytes() for block in cut] == [block.to_bytes() for block in blocks]
        assert [block.fingerprint for block in cut] == [llama.fingerprint] * len(blocks)
        assert (last is None) == (checkpoint is None)
        if last is not None:
            assert checkpoint is not None
            assert last.to_bytes() == checkpoint.to_bytes()
            assert last.position == checkpoint.position

        joined = join_blocks(blocks, checkpoint, parts_in_blocks=parts)
        assert joined.to_bytes() == snapshot.to_bytes()
        assert joined.fingerprint == llama.fingerprint
        await llama.load(joined, 1)
        assert context.pos_max(1) == TOKENS - 1


async def test_what_cannot_be_cut_or_joined_is_refused(context: Context) -> None:
    state = context.state_get(0)
    with pytest.raises(kvferry.StateDamaged):
        cut_state(state[:-1], [(0, 64)])
    with pytest.raises(kvferry.SequenceEmpty):
        cut_state(state, [(TOKENS, TOKENS + 1)])
    for spans in ([(64, 128), (0, 64)], [(0, 64), (63, 128)], [(5, 5)], []):
        with pytest.raises(ValueError):  # noqa: PT011
            cut_state(state, spans)
    blocks, checkpoint = cut_state(state, [(0, 64), (64, 128)])
    assert checkpoint is None
    with pytest.raises(ValueError):  # noqa: PT011
        join_blocks([])
    with pytest.raises(ValueError):  # noqa: PT011
        join_blocks(blocks[::-1])
    blocks[0].fingerprint, blocks[1].fingerprint = "one", "two"
    with pytest.raises(kvferry.StateMismatch, match="of several models: one, two"):
        join_blocks(blocks)
