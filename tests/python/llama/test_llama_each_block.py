"""Saves of blocks that tell when each block is whole: Llama.start_save_blocks(each_block=True)."""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import AsyncIterator

import anyio
import kvferry
import pytest
from kvferry import SaveMode
from support.devices import DEVICES, LARGE_TOKENS
from support.event_loops import anyio_backend  # noqa: F401
from support.like_contexts import MakeContext
from support.llama_reference import Context, Model

pytestmark = pytest.mark.anyio

TOKENS = 200
BLOCK = 64
TRIES = 200
"""How often a transfer is tried that may end before the test has looked at it."""


@pytest.fixture
def large(make_context: MakeContext, large_model: Model) -> Context:
    """A context whose sequence 0 takes some milliseconds to move, with 1 MiB a token."""
    context = make_context(large_model, n_ctx=2 * LARGE_TOKENS)
    context.decode(0, context.model.prompt(LARGE_TOKENS))
    return context


async def in_flight(llama: kvferry.Llama) -> AsyncIterator[kvferry.SaveBlocksTransfer]:
    """Yields saves of single tokens of which a block is whole. A save may have ended."""
    for _ in range(TRIES):
        transfer = await llama.start_save_blocks(0, tokens=1, each_block=True)
        await transfer.block(0)
        yield transfer
        if not transfer.done:
            transfer.cancel()
        with contextlib.suppress(kvferry.TransferCancelled):
            await transfer.wait()


# ---- The plain case ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["in_place", "snapshot"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "hybrid"])
async def test_each_block_is_whole_when_it_is_told_of(
    make_context: MakeContext, kind: str, mode: SaveMode
) -> None:
    context = make_context(kind, n_ctx=1024)
    context.decode(0, context.model.prompt(TOKENS))
    keys = [b"a", b"b", b"c", b"d"]
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        expected = await llama.save_blocks(0, tokens=BLOCK, keys=keys, parent=b"p", mode=mode)
        transfer = await llama.start_save_blocks(
            0, tokens=BLOCK, keys=keys, parent=b"p", mode=mode, each_block=True
        )
        assert transfer.count == 4
        blocks = []
        for index, like in enumerate(expected):
            block = await transfer.block(index)
            assert block.to_bytes() == like.to_bytes()
            assert (block.begin, block.end) == (like.begin, like.end)
            assert (block.key, block.parent) == (like.key, like.parent)
            assert block.fingerprint == like.fingerprint
            assert block.completion is not None
            assert block.completion.bytes == block.nbytes
            assert block.completion.status == 0
            assert await transfer.block(index) is block
            blocks.append(block)
        assert all(one is other for one, other in zip(blocks, await transfer.wait(), strict=True))
        assert transfer.completion is not None
        assert transfer.completion.bytes == sum(block.nbytes for block in blocks)


async def test_blocks_are_whole_while_others_are_moved(large: Context) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(large.address)
        expected = [block.to_bytes() for block in await llama.save_blocks(0, tokens=1)]
        early = 0
        async for transfer in in_flight(llama):
            for index, like in enumerate(expected):
                block = await transfer.block(index)
                early += not transfer.done
                assert block.to_bytes() == like
            if early:
                break
        assert early


async def test_any_task_may_wait_for_any_block(large: Context) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(large.address)
        expected = await llama.save_blocks(0, tokens=1)
        transfer = await llama.start_save_blocks(0, tokens=1, each_block=True)
        seen: dict[int, bytes] = {}

        async def wait_for(index: int) -> None:
            seen[index] = (await transfer.block(index)).to_bytes()

        async with anyio.create_task_group() as tasks:
            for index in reversed(range(transfer.count)):
                tasks.start_soon(wait_for, index)
            tasks.start_soon(transfer.wait)
        assert seen == {index: block.to_bytes() for index, block in enumerate(expected)}


async def test_blocks_that_were_not_asked_for_are_told_of_at_the_end(large: Context) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(large.address)
        transfer = await llama.start_save_blocks(0, tokens=1)
        block = await transfer.block(0)
        assert transfer.done
        assert block.completion is transfer.completion
        assert (await transfer.wait())[0] is block


async def test_an_index_that_no_block_has_is_refused(large: Context) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(large.address)
        transfer = await llama.start_save_blocks(0, tokens=1, each_block=True)
        for index in (-1, transfer.count):
            with pytest.raises(kvferry.InvalidArgument, match="index"):
                await transfer.block(index)
        with pytest.raises(TypeError, match="index"):
            await transfer.block("0")  # type: ignore[arg-type]
        await transfer.wait()


# ---- Memory --------------------------------------------------------------------------------------


async def test_the_memory_of_a_whole_block_is_free_while_others_are_moved(large: Context) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(large.address)
        into = [bytearray(llama.block_size(1)) for _ in range(LARGE_TOKENS)]
        for _ in range(TRIES):
            transfer = await llama.start_save_blocks(0, tokens=1, into=into, each_block=True)
            block = await transfer.block(0)
            content = block.to_bytes()
            with pytest.raises(kvferry.Busy):  # the Block owns it
                await llama.save_blocks(0, 0, 1, into=into[:1])
            block.close()
            again = await llama.save_blocks(0, 0, 1, into=into[:1], priority="urgent")
            was_early = not transfer.done
            assert again[0].to_bytes() == content
            again[0].close()
            for other in await transfer.wait():
                other.close()
            if was_early:
                return
        raise AssertionError("no transfer was seen in flight")


async def test_a_buffer_of_the_pool_is_free_when_its_block_is_closed(large: Context) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(large.address)

        for _ in range(TRIES):
            transfer = await llama.start_save_blocks(0, tokens=1, each_block=True)
            block = await transfer.block(0)
            before = engine.describe()["pool"]["free"]
            block.close()
            description = engine.describe()
            assert description["pool"]["free"] >= before + block.nbytes
            await transfer.wait()
            if description["jobs_in_flight"]:
                return
        raise AssertionError("no transfer was seen in flight")


# ---- However it ends -----------------------------------------------------------------------------


async def test_blocks_of_a_cancelled_save_are_whole_or_not_there(large: Context) -> None:
    pace = random.Random(0)
    ends = set()
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(large.address)
        expected = [block.to_bytes() for block in await llama.save_blocks(0, tokens=1)]
        for _ in range(TRIES):
            transfer = await llama.start_save_blocks(0, tokens=1, each_block=True)
            await transfer.block(pace.randrange(2))
            transfer.cancel()
            whole = 0
            for index, like in enumerate(expected):
                try:
                    block = await transfer.block(index)
                except kvferry.TransferCancelled:
                    continue
                whole += 1
                assert block.to_bytes() == like
            try:
                await transfer.wait()
                assert whole == len(expected)
                ends.add("whole")
            except kvferry.TransferCancelled:
                assert whole > 0
                ends.add("cancelled")
            if "cancelled" in ends:
                break
        assert "cancelled" in ends


async def test_a_task_that_waits_for_a_block_and_is_cancelled_cancels_the_save(
    large: Context,
) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(large.address)
        for _ in range(TRIES):
            into = [bytearray(llama.block_size(1)) for _ in range(LARGE_TOKENS)]
            transfer = await llama.start_save_blocks(0, tokens=1, into=into, each_block=True)
            with anyio.move_on_after(0.0005) as scope:
                await transfer.block(LARGE_TOKENS - 1)
            if not scope.cancelled_caught:
                continue
            assert transfer.done
            assert transfer.completion is not None
            was_cancelled = transfer.completion.status != 0
            del transfer
            gc.collect()
            for memory in into:
                memory.append(0)  # raises BufferError if a job still uses it
            if was_cancelled:
                return
        raise AssertionError("no transfer was cancelled")


async def test_a_task_that_waits_for_a_block_is_woken_by_a_cancel(large: Context) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(large.address)
        outcomes: list[str] = []
        for _ in range(TRIES):
            transfer = await llama.start_save_blocks(0, tokens=1, each_block=True)

            async def wait_for(index: int, transfer: kvferry.SaveBlocksTransfer) -> None:
                try:
                    await transfer.block(index)
                    outcomes.append("whole")
                except kvferry.TransferCancelled:
                    outcomes.append("cancelled")

            async with anyio.create_task_group() as tasks:
                for index in (0, LARGE_TOKENS // 2, LARGE_TOKENS - 1):
                    tasks.start_soon(wait_for, index, transfer)
                await anyio.wait_all_tasks_blocked()
                transfer.cancel()
            if "cancelled" in outcomes:
                break
        assert "cancelled" in outcomes


async def test_a_closed_engine_ends_those_who_wait_for_a_block(large: Context) -> None:
    refused = 0

    async def wait_for_last(transfer: kvferry.SaveBlocksTransfer) -> None:
        nonlocal refused
        try:
            await transfer.block(LARGE_TOKENS - 1)
        except kvferry.EngineClosed:
            refused += 1

    for _ in range(TRIES):
        async with anyio.create_task_group() as tasks, kvferry.Engine(DEVICES) as engine:
            llama = engine.attach(large.address)
            transfer = await llama.start_save_blocks(0, tokens=1, each_block=True)
            tasks.start_soon(wait_for_last, transfer)
            await transfer.block(0)
            await engine.aclose(cancel=True)
        if refused:
            break
    assert refused


async def test_a_refused_save_tells_of_no_block(large: Context) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(large.address)
        with pytest.raises(kvferry.SequenceEmpty):
            await llama.start_save_blocks(1, tokens=1, each_block=True)
        with pytest.raises(kvferry.SequenceEmpty):
            await llama.start_save_blocks(1, 0, 2, tokens=1, each_block=True)
        small = [bytearray(8) for _ in range(LARGE_TOKENS)]
        with pytest.raises(kvferry.BufferTooSmall):
            await llama.start_save_blocks(0, tokens=1, into=small, each_block=True)
        assert len(await llama.save_blocks(0, tokens=1)) == LARGE_TOKENS
