"""The store's budgets, by what the process and the folder really occupy."""

from __future__ import annotations

import gc
from pathlib import Path

import kvferry
import pytest
import store_budgets
from disk_stores import BLOCK, prompted, store_in
from support.devices import DEVICES
from support.event_loops import anyio_backend  # noqa: F401
from support.like_contexts import MakeContext
from test_store_disk import damage

pytestmark = pytest.mark.anyio


async def test_budgets_hold_at_random_operations(make_context: MakeContext, tmp_path: Path) -> None:
    context = make_context("llama", n_ctx=2048, n_seq_max=8)
    walk = store_budgets.Walk(context, tmp_path / "store", seed=2)
    await walk.run(1200)
    store_budgets.check(walk.most)
    assert walk.most.done["cancelled"] > 30
    assert walk.most.stats["evicted"] > 30
    assert walk.most.taken > store_budgets.RAM * 3 // 4


async def test_what_could_not_be_read_takes_no_memory(
    make_context: MakeContext, tmp_path: Path
) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        async with store_in(tmp_path) as store:
            await store.keep(llama, 0, prompt)
        damage(tmp_path)
        async with store_in(tmp_path) as store:
            gc.collect()
            gc.disable()
            try:
                assert await store.restore(llama, 1, prompt, leave=0) < BLOCK
                pool = engine.describe()["pool"]
            finally:
                gc.enable()
            assert pool["mapped"] == pool["free"]
