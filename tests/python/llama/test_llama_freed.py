"""Calls on a context that has been freed, and on an attachment that was detached or closed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import kvferry
import pytest
from kvferry.tools.synthetic import KINDS
from support.devices import DEVICES, LARGE_TOKENS
from support.like_contexts import MakeContext, make_prompted
from support.llama_reference import Model

pytestmark = pytest.mark.anyio


async def assert_every_call_raises(
    llama: kvferry.Llama, error: type[Exception], snapshot: kvferry.Snapshot
) -> None:
    with pytest.raises(error):
        await llama.save(0)
    with pytest.raises(error):
        await llama.load(snapshot, 1)
    with pytest.raises(error):
        await llama.remove(0)
    with pytest.raises(error):
        await llama.size_async(0)
    with pytest.raises(error):
        llama.size(0)


async def test_freeing_a_context_ends_its_transfers_first(large_model: Model) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        for _ in range(3):
            context = large_model.context(n_ctx=4 * LARGE_TOKENS)
            context.decode(0, large_model.prompt(LARGE_TOKENS))
            llama = engine.attach(context.address)
            snapshot = await llama.save(0)
            transfers: list[Any] = [
                await llama.start_save(0),
                await llama.start_load(snapshot, 1),
                await llama.start_load(snapshot, 2),
            ]
            await llama.run(context.close)
            for transfer in transfers:
                with contextlib.suppress(kvferry.TransferCancelled, kvferry.ContextFreed):
                    await transfer.wait()
                assert transfer.done
            await assert_every_call_raises(llama, kvferry.ContextFreed, snapshot)
            await llama.detach()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_freed_context_is_noticed(model: Callable[..., Model], kind: str) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        context = model(kind).context()
        context.decode(0, context.model.prompt(10))
        llama = engine.attach(context.address)
        snapshot = await llama.save(0)
        context.close()
        await assert_every_call_raises(llama, kvferry.ContextFreed, snapshot)
        llama.describe()
        await llama.detach()


async def test_a_detached_or_closed_attachment_refuses_every_call(
    make_context: MakeContext,
) -> None:
    context = make_prompted(make_context, "llama")
    engine = kvferry.Engine(DEVICES)
    llama, other = engine.attach(context.address), engine.attach(context.address)
    snapshot = await llama.save(0)
    await llama.detach()
    await assert_every_call_raises(llama, kvferry.EngineClosed, snapshot)
    await engine.aclose()
    await assert_every_call_raises(other, kvferry.EngineClosed, snapshot)
    with pytest.raises(kvferry.EngineClosed):
        engine.attach(context.address)
    assert snapshot.to_bytes() == context.state_get(0)


async def test_no_context_is_refused() -> None:
    async with kvferry.Engine(DEVICES) as engine:
        with pytest.raises(kvferry.ContextFreed):
            engine.attach(None)
        with pytest.raises(kvferry.ContextFreed):
            engine.attach(0)
        with pytest.raises(TypeError):
            engine.attach("a context")
