"""What a sequence holds after a load into it was cancelled or refused."""

from __future__ import annotations

import threading
from typing import Any

import anyio
import anyio.to_thread
import kvferry
import numpy as np
import pytest
from support.devices import DEVICES, LARGE_TOKENS
from support.like_contexts import MakeContext, make_prompted
from support.llama_reference import Model, Refused

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("mode", ["in_place", "ahead"])
async def test_a_cancelled_load_leaves_the_sequence_empty_and_the_others_alone(
    make_context: MakeContext, large_model: Model, mode: Any
) -> None:
    context = make_context(large_model, n_ctx=8 * LARGE_TOKENS)
    context.decode(0, large_model.prompt(LARGE_TOKENS))
    context.decode(1, large_model.prompt(LARGE_TOKENS, seed=1))
    cancelled = 0
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        snapshots = [await llama.save(seq) for seq in (0, 1)]
        for turn in range(20):
            transfer = await llama.start_load(snapshots[0], 2, mode=mode)
            await anyio.sleep(0.0005 * (turn % 4))
            transfer.cancel()
            try:
                await transfer.wait()
            except kvferry.TransferCancelled:
                cancelled += 1
                # It is empty without a further call: the program never sees a partial sequence.
                assert context.pos_max(2) == -1
            else:
                assert context.pos_max(2) == LARGE_TOKENS - 1
        for snapshot, seq in zip(snapshots, (0, 1), strict=True):
            assert np.array_equal((await llama.save(seq)).numpy(), snapshot.numpy())
        await llama.load(snapshots[0], 2)
        await llama.remove(2)
    assert cancelled > 0
    context.decode(3, large_model.prompt(6 * LARGE_TOKENS))
    with pytest.raises(Refused):
        context.decode(3, [1])


async def test_a_load_that_is_cancelled_before_it_begins_leaves_the_sequence(
    make_context: MakeContext,
) -> None:
    context = make_prompted(make_context, "llama")
    state = context.state_get(1)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        snapshot = await llama.save(0)
        assert llama.load_outcome(1) is None
        began, release = threading.Event(), threading.Event()

        def hold() -> None:
            began.set()
            release.wait()

        async def load() -> None:
            try:
                await llama.load(snapshot, 1)
            finally:
                outcomes.append(llama.load_outcome(1))

        outcomes: list[str | None] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(llama.run, hold)
            await anyio.to_thread.run_sync(began.wait)
            async with anyio.create_task_group() as loads:
                loads.start_soon(load)
                await anyio.wait_all_tasks_blocked()
                assert llama.load_outcome(1) == "in_flight"
                loads.cancel_scope.cancel()
            assert outcomes == ["unchanged"]
            release.set()
        assert llama.load_outcome(1) == "unchanged"
        assert context.state_get(1) == state
        await llama.load(snapshot, 1)
        assert llama.load_outcome(1) == "loaded"


@pytest.mark.parametrize("mode", ["in_place", "ahead"])
async def test_the_outcome_of_a_cancelled_load_is_what_the_sequence_holds(
    make_context: MakeContext, large_model: Model, mode: Any
) -> None:
    context = make_context(large_model, n_ctx=8 * LARGE_TOKENS)
    context.decode(0, large_model.prompt(LARGE_TOKENS))
    context.decode(1, large_model.prompt(5, seed=1))
    small = context.state_get(1)
    outcomes: set[str | None] = set()
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        snapshot = await llama.save(0)
        for turn in range(200):
            await llama.load(small, 2)
            delay = 0 if turn % 3 == 0 else 0.0002 * (turn % 40)
            with anyio.move_on_after(delay):
                await llama.load(snapshot, 2, mode=mode)
            outcome = llama.load_outcome(2)
            outcomes.add(outcome)
            last = {"unchanged": 4, "empty": -1, "loaded": LARGE_TOKENS - 1}
            assert context.pos_max(2) == last[str(outcome)]
            if len(outcomes) == 3:
                break
    assert "empty" in outcomes


async def test_the_outcome_of_a_refused_load_is_what_the_sequence_holds(
    make_context: MakeContext,
) -> None:
    context = make_prompted(make_context, "llama", n_ctx=256)
    other = make_context("llama")
    other.decode(0, other.model.prompt(300))
    large = other.state_get(0)
    state = context.state_get(0)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        for bad in (state[:-1], b"?" * len(state), b"", large):
            context.decode(2, [1, 2, 3])
            with pytest.raises(kvferry.KvferryError):
                await llama.load(bad, 2)
            assert llama.load_outcome(2) == ("empty" if context.pos_max(2) == -1 else "unchanged")
            context.seq_rm(2)
        with pytest.raises(kvferry.SequenceRange):
            await llama.load(state, 7)
        assert llama.load_outcome(7) == "unchanged"
