"""Store with a folder: what is kept outlives RAM and the process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import kvferry
import numpy as np
import pytest
from disk_stores import TOKENS, kept_in, prompted, store_in
from kvferry import Store
from new_process import assert_a_new_process_goes_on
from support.devices import DEVICES
from support.event_loops import anyio_backend  # noqa: F401
from support.like_contexts import MakeContext

pytestmark = pytest.mark.anyio

KINDS = ["llama", "qwen2vl", "deepseek32", "gemma3", "hybrid", "mamba"]


@pytest.mark.parametrize("kind", KINDS)
async def test_another_store_finds_it_in_the_folder(
    make_context: MakeContext, tmp_path: Path, kind: str
) -> None:
    context, prompt = prompted(make_context, kind)
    state = context.state_get(0)
    fresh, like = (make_context(kind, n_ctx=1024) for _ in range(2))
    async with kvferry.Engine(DEVICES) as engine:
        async with store_in(tmp_path) as store:
            assert await store.keep(engine.attach(context.address), 0, prompt) == TOKENS
        async with store_in(tmp_path, salt=b"another") as store:
            assert await store.restore(engine.attach(fresh.address), 0, [*prompt, 7]) == 0
        async with store_in(tmp_path) as store:
            llama = engine.attach(fresh.address)
            found = await store.find(llama, [*prompt, 7])
            assert (found.tokens, found.tier) == (TOKENS, "disk")
            assert await store.restore(llama, 0, [*prompt, 7]) == TOKENS
            assert (await store.find(llama, [*prompt, 7])).tier == "ram"
            assert store.stats()["ram_reserved"] == 0
    like.state_set(0, state)
    assert fresh.state_get(0) == like.state_get(0)
    assert np.array_equal(fresh.decode(0, [7]), like.decode(0, [7]))


async def test_a_new_process_finds_it(
    make_context: MakeContext, model_path: Callable[..., Path], tmp_path: Path
) -> None:
    context, prompt = prompted(make_context, "llama")
    state = context.state_get(0)
    async with kvferry.Engine(DEVICES) as engine, store_in(tmp_path / "store") as store:
        await store.keep(engine.attach(context.address), 0, prompt)
    assert_a_new_process_goes_on(
        model_path("llama"),
        make_context("llama", n_ctx=1024),
        state,
        tmp_path,
        disk=str(tmp_path / "store"),
        disk_limit="1 GiB",
    )


def damage(folder: Path, name: str = "*.*") -> None:
    """Changes the last byte of every block and checkpoint of this name."""
    paths = [*(folder / "parts").glob(name)]
    assert paths
    for path in paths:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("kind", ["llama", "hybrid"])
async def test_a_damaged_file_shortens_what_is_restored(
    make_context: MakeContext, tmp_path: Path, kind: str
) -> None:
    async with kept_in(tmp_path, make_context, kind) as (context, llama, prompt):
        damage(tmp_path)
        async with store_in(tmp_path) as store:
            assert await store.restore(llama, 1, prompt, leave=0) == 0
            assert context.pos_max(1) == -1
            # It can be kept and found again.
            assert await store.keep(llama, 0, prompt) == TOKENS
            await store.flush()
        async with store_in(tmp_path) as store:
            assert await store.restore(llama, 1, prompt, leave=0) == TOKENS


@pytest.mark.parametrize("kind", ["llama", "hybrid"])
async def test_a_keep_fills_the_gap_of_a_lost_block(
    make_context: MakeContext, tmp_path: Path, kind: str
) -> None:
    context, prompt = prompted(make_context, kind)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        async with store_in(tmp_path) as store:
            await store.keep(llama, 0, prompt[:TOKENS])
            (first,) = (part for part in store._ram if part.description.begin == 0)
            name = first.description.key.hex()
        damage(tmp_path, f"{name}.block")
        async with store_in(tmp_path) as store:
            assert await store.restore(llama, 1, prompt, leave=0) == 0
            assert await store.keep(llama, 0, prompt) == TOKENS
            assert await store.restore(llama, 1, prompt, leave=0) == TOKENS


async def test_what_left_ram_comes_back_from_the_folder(
    make_context: MakeContext, tmp_path: Path
) -> None:
    context = make_context("llama", n_ctx=1024)
    prompts = [context.model.prompt(100, seed=seed) for seed in range(12)]
    async with kvferry.Engine(DEVICES) as engine, store_in(tmp_path, ram="1 MiB") as store:
        llama = engine.attach(context.address)
        for prompt in prompts:
            await llama.remove(0)
            await llama.run(context.decode, 0, prompt)
            assert await store.keep(llama, 0, prompt) == 100
        await store.flush()
        store.clear()
        for prompt in prompts:
            assert await store.restore(llama, 1, prompt, leave=0) == 100
            assert store.stats()["ram_used"] <= 1 << 20
        store.clear()
        store.prefetch(llama, prompts[0])
        while not store.stats()["ram_entries"]:
            await llama.run(lambda: None)


async def test_disk_and_its_limit_go_together(tmp_path: Path) -> None:
    with pytest.raises(kvferry.InvalidArgument, match="both or neither"):
        Store(ram=1, disk=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        async with store_in(tmp_path / "file"):
            pass
