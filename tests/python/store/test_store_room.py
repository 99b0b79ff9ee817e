"""Store: what is saved, what is evicted, and how much memory and disk that takes."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any

import anyio
import kvferry
import pytest
from disk_parts import occupied
from disk_stores import BLOCK, TOKENS, prompted, store_in, until
from kvferry import Store
from kvferry.store.behind import Behind
from kvferry.store.buffers import Buffers
from kvferry.store.description import Description
from kvferry.store.disk import Disk
from kvferry.store.ram import Entry, Ram
from support.devices import DEVICES
from support.event_loops import anyio_backend  # noqa: F401
from support.like_contexts import MakeContext

pytestmark = pytest.mark.anyio


# ---- What is on the disk alone -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "hybrid", "mamba"])
async def test_what_is_on_the_disk_alone_is_not_saved_again(
    make_context: MakeContext, tmp_path: Path, kind: str
) -> None:
    context, prompt = prompted(make_context, kind)
    async with kvferry.Engine(DEVICES) as engine, store_in(tmp_path) as store:
        llama = engine.attach(context.address)
        await store.keep(llama, 0, prompt)
        await store.flush()
        store.clear()
        saved = store.stats()["saved_bytes"]
        assert await store.keep(llama, 0, prompt) == TOKENS
        assert store.stats()["saved_bytes"] == saved
        if kind == "llama":
            context.decode(0, turn := context.model.prompt(60, seed=3))
            assert await store.keep(llama, 0, prompt + turn) == TOKENS + 60
            new = llama.block_size(64) + llama.block_size(4)
            assert store.stats()["saved_bytes"] == saved + new
            prompt = prompt + turn
        assert await store.restore(llama, 1, prompt, leave=0) == len(prompt)


async def test_a_keep_renews_what_is_on_the_disk_alone(
    make_context: MakeContext, tmp_path: Path
) -> None:
    context = make_context("llama", n_ctx=1024)
    prompts = [context.model.prompt(BLOCK, seed=seed) for seed in range(40)]
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        async with store_in(tmp_path, limit="2 MiB") as store:
            for prompt in prompts:
                await llama.remove(0)
                await llama.run(context.decode, 0, prompt)
                await store.keep(llama, 0, prompt)
                await store.flush()
                store.clear()
                # The first one is of use again and again.
                await llama.remove(0)
                await llama.run(context.decode, 0, prompts[0])
                assert await store.keep(llama, 0, prompts[0]) == BLOCK
        assert store.stats()["saved_bytes"] == len(prompts) * llama.block_size(BLOCK)
        async with store_in(tmp_path, limit="2 MiB") as store:
            found = [(await store.find(llama, each, leave=0)).tokens for each in prompts]
    assert found[0] == BLOCK
    assert found[1] == 0


async def test_only_a_lost_block_is_saved_again(make_context: MakeContext, tmp_path: Path) -> None:
    context, prompt = prompted(make_context, "llama")
    state = context.state_get(0)
    async with kvferry.Engine(DEVICES) as engine, store_in(tmp_path) as store:
        llama = engine.attach(context.address)
        await store.keep(llama, 0, prompt)
        await store.flush()
        parts = sorted((each.description for each in store._ram), key=lambda part: part.begin)
        store.clear()
        store._behind.disk.remove("block", parts[1].key)  # type: ignore[union-attr]
        # What follows the lost block is of no use.
        assert (await store.find(llama, prompt, leave=0)).tokens == BLOCK
        assert await store.restore(llama, 1, prompt, leave=0) == BLOCK
        saved = store.stats()["saved_bytes"]
        assert await store.keep(llama, 0, prompt) == TOKENS
        assert store.stats()["saved_bytes"] == saved + llama.block_size(BLOCK)
        await llama.remove(0)
        assert await store.restore(llama, 0, prompt, leave=0) == TOKENS
        assert context.state_get(0) == state


# ---- Checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gemma3", "hybrid"])
async def test_a_checkpoint_is_not_kept_without_its_blocks(
    make_context: MakeContext, kind: str
) -> None:
    context, prompt = prompted(make_context, kind)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        blocks = llama.block_size(BLOCK) * (TOKENS // BLOCK)
        for room in (llama.checkpoint_size(0), llama.checkpoint_size(0) + blocks // 2):
            async with Store(ram=2 * room, block_tokens=BLOCK) as store:
                store._ram.limit = store._ram.used + room * 5 // 4 + (1 << 15)
                assert await store.keep(llama, 0, prompt) == 0
                stats = store.stats()
                assert (stats["ram_entries"], stats["ram_reserved"]) == (0, 0)


# ---- The budget ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "limit"), [("llama", 1200 << 10), ("hybrid", 600 << 10)])
async def test_the_pools_never_have_more_than_the_budget(
    make_context: MakeContext, tmp_path: Path, kind: str, limit: int
) -> None:
    """Two engines, whose pools hold nothing but the store's buffers. They are asked at every turn
    of the event loop."""
    chooser = random.Random(11)
    contexts = [make_context(kind, n_ctx=1024) for _ in range(2)]
    # One block each, of many sizes, so that free buffers are a little too large.
    prompts = [contexts[0].model.prompt(100 + 9 * index, seed=index) for index in range(17)]
    async with (
        kvferry.Engine(DEVICES) as first,
        kvferry.Engine(DEVICES) as second,
        Store(ram=limit, disk=tmp_path, disk_limit="1 GiB") as store,
    ):
        engines = [first, second]
        llamas = [
            engine.attach(context.address)
            for engine, context in zip(engines, contexts, strict=True)
        ]
        most = samples = 0

        def sample() -> None:
            nonlocal most, samples
            pools = [engine.describe()["pool"] for engine in engines]
            most = max(most, sum(pool["mapped"] - pool["free"] for pool in pools))
            stats = store.stats()
            assert stats["ram_used"] + stats["ram_reserved"] <= limit
            samples += 1

        async def look() -> None:
            while True:
                sample()
                await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(look)
            for _ in range(60):
                index, tokens = chooser.randrange(2), chooser.choice(prompts)
                llama, context = llamas[index], contexts[index]
                match chooser.randrange(6):
                    case 0 | 1 | 2:
                        await llama.remove(0)
                        await llama.run(context.decode, 0, tokens)
                        await store.keep(llama, 0, tokens, name=f"{len(tokens)}")
                    case 3 | 4:
                        await store.restore(llama, 1, tokens, leave=0)
                    case 5 if store.list():
                        store.evict(chooser.choice(store.list()).name)
                sample()
            tasks.cancel_scope.cancel()
        assert most <= limit
        assert most > limit // 2
        assert samples > 60
        assert store.stats()["evicted"] > 0


async def test_a_larger_buffer_of_the_pool_does_not_break_the_budget(
    make_context: MakeContext,
) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        nbytes = llama.block_size(TOKENS)
        limit = nbytes + 70_000

        def taken() -> int:
            pool = engine.describe()["pool"]
            return int(pool["mapped"] - pool["free"])

        async with Store(ram=limit) as store:
            (await engine.allocate(nbytes * 6 // 5)).close()
            most = 0

            async def look() -> None:
                nonlocal most
                while True:
                    most = max(most, taken())
                    await anyio.lowlevel.checkpoint()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(look)
                for _ in range(20):
                    await store.keep(llama, 0, prompt)
                tasks.cancel_scope.cancel()
            assert most <= limit
            assert store.stats()["ram_used"] == taken()
            assert await store.keep(llama, 0, prompt[: TOKENS // 2]) == TOKENS // 2


async def test_the_budget_holds_over_thousands_of_buffers() -> None:
    limit, chooser = 4 << 20, random.Random(7)
    async with kvferry.Engine("host") as first, kvferry.Engine("host") as second:
        engines, ram = [first, second], Ram(limit)
        buffers = Buffers(ram, None)
        most = 0

        def sample() -> None:
            nonlocal most
            pools = [engine.describe()["pool"] for engine in engines]
            taken = sum(pool["mapped"] - pool["free"] for pool in pools)
            assert taken <= ram.used + ram.reserved <= limit
            most = max(most, taken)

        async def work() -> None:
            for _ in range(800):
                engine, nbytes = chooser.choice(engines), chooser.randrange(1, 600_000)
                if (taken := await buffers.take(engine, nbytes)) is None:  # type: ignore[arg-type]
                    continue
                sample()
                await anyio.lowlevel.checkpoint()
                buffer, room = taken
                key, parent = (chooser.randrange(200).to_bytes(32, "big") for _ in range(2))
                part = Description("block", key, parent, 0, 1, bytes(32), nbytes, 0)
                entry = ram.add(Entry(part, buffer, buffer.capacity), room)  # type: ignore[arg-type]
                with ram.held([entry]):
                    sample()
                    await anyio.lowlevel.checkpoint()
                if chooser.random() < 0.1:
                    ram.remove(entry)
                sample()

        async with anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(work)
        assert ram.reserved == 0
        assert ram.evicted > 500
        assert most > limit * 3 // 4
        ram.remove_all(ram)


async def test_a_scan_does_not_push_out_what_was_used_twice(make_context: MakeContext) -> None:
    context = make_context("llama", n_ctx=1024)
    async with kvferry.Engine(DEVICES) as engine, Store(ram="2 MiB", block_tokens=BLOCK) as store:
        llama = engine.attach(context.address)
        used, once = (context.model.prompt(100, seed=seed) for seed in (100, 101))
        for tokens in (used, once):
            await llama.remove(0)
            await llama.run(context.decode, 0, tokens)
            await store.keep(llama, 0, tokens)
        for _ in range(2):
            assert await store.restore(llama, 1, used, leave=0) == 100
        for seed in range(60):
            tokens = context.model.prompt(100, seed=seed)
            await llama.remove(0)
            await llama.run(context.decode, 0, tokens)
            assert await store.keep(llama, 0, tokens) == 100
        assert store.stats()["evicted"] > 60
        assert (await store.find(llama, used, leave=0)).tokens == 100
        assert (await store.find(llama, once, leave=0)).tokens == 0


async def test_what_a_restore_uses_is_not_evicted_meanwhile(
    make_context: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = make_context("llama", n_ctx=1024)
    prompt = context.model.prompt(TOKENS)
    context.decode(0, prompt)
    state = context.state_get(0)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        # Room for the prompt, and some more.
        async with store_in(tmp_path, ram=2 * llama.block_size(TOKENS)) as store:
            await store.keep(llama, 0, prompt)
            await store.flush()
            store.clear()
            assert await store.restore(llama, 1, prompt[: 2 * BLOCK], leave=0) == 2 * BLOCK
            evicted, read, keeps = store.stats()["evicted"], Behind.read, 0

            async def read_late(self: Behind, *arguments: Any, **keywords: Any) -> bool:
                nonlocal keeps
                for _ in range(5):
                    keeps += 1
                    tokens = context.model.prompt(70, seed=keeps)
                    await llama.remove(2)
                    await llama.run(context.decode, 2, tokens)
                    await store.keep(llama, 2, tokens)
                    await store.flush()
                return await read(self, *arguments, **keywords)

            monkeypatch.setattr(Behind, "read", read_late)
            await llama.remove(0)
            assert await store.restore(llama, 0, prompt, leave=0) == TOKENS
            assert keeps >= 5
            assert store.stats()["evicted"] > evicted
    assert context.state_get(0) == state


# ---- Pins, names and times to live ---------------------------------------------------------------


@pytest.mark.parametrize("pinned", [True, False])
async def test_a_pin_keeps_files_while_the_store_is_open(
    make_context: MakeContext, tmp_path: Path, pinned: bool
) -> None:
    context = make_context("llama", n_ctx=1024)
    first = context.model.prompt(100, seed=100)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        async with store_in(tmp_path, limit="2 MiB") as store:
            await llama.run(context.decode, 0, first)
            await store.keep(llama, 0, first, name="first")
            await store.flush()
            store.clear()
            # All of it is on the disk alone when it gets its name.
            assert await store.keep(llama, 0, first, name="first") == 100
            (listed,) = store.list()
            assert (listed.tokens, listed.nbytes) == (100, 0)
            if pinned:
                store.pin("first")
            for seed in range(40):
                tokens = context.model.prompt(100, seed=seed)
                await llama.remove(0)
                await llama.run(context.decode, 0, tokens)
                await store.keep(llama, 0, tokens)
                await store.flush()
                assert occupied(tmp_path) <= 2 << 20
            assert await store.restore(llama, 1, first, leave=0) == (100 if pinned else 0)
            assert store.stats()["disk_writes_failed"] == 0


@pytest.mark.parametrize("kind", ["llama", "hybrid", "mamba"])
async def test_a_new_context_finds_what_was_kept_in_a_folder_that_was_full(
    make_context: MakeContext, tmp_path: Path, kind: str
) -> None:
    """The note of the layout is the oldest file, and must not go first."""
    context = make_context(kind, n_ctx=1024)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        async with store_in(tmp_path, limit="2 MiB") as store:
            for seed in range(40):
                tokens = context.model.prompt(70 + 7 * (seed % 14), seed=seed)
                await llama.remove(0)
                await llama.run(context.decode, 0, tokens)
                await store.keep(llama, 0, tokens)
                await store.flush()
        async with store_in(tmp_path, limit="2 MiB") as store:
            fresh = engine.attach(make_context(kind, n_ctx=1024).address)
            assert await store.restore(fresh, 0, tokens, leave=0) == len(tokens)


async def test_a_note_that_could_not_be_written_is_written_by_a_later_keep(
    make_context: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        async with store_in(tmp_path) as store:
            write = Disk.write

            def refuse(disk: Disk, part: Description, data: bytes) -> bool:
                return part.kind != "layout" and write(disk, part, data)

            monkeypatch.setattr(Disk, "write", refuse)
            await store.keep(llama, 0, prompt[:100])
            await store.flush()
            monkeypatch.undo()
            await store.keep(llama, 0, prompt)
        async with store_in(tmp_path) as store:
            fresh = engine.attach(make_context("llama", n_ctx=1024).address)
            assert await store.restore(fresh, 0, prompt, leave=0) == TOKENS


async def test_the_disk_finds_what_has_expired_in_ram(
    make_context: MakeContext, tmp_path: Path
) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine, store_in(tmp_path) as store:
        llama = engine.attach(context.address)
        await store.keep(llama, 0, prompt, ttl=0.0)
        await store.flush()
        found = await store.find(llama, prompt, leave=0)
        assert (found.tokens, found.tier) == (TOKENS, "disk")
        assert await store.restore(llama, 1, prompt, leave=0) == TOKENS
        assert (await store.find(llama, prompt, leave=0)).tier == "ram"
        await until(lambda: not store.stats()["ram_reserved"])


@pytest.mark.parametrize("turns", [0, 1, 5, 20, 60])
async def test_a_keep_that_goes_on_when_the_store_is_left(
    make_context: MakeContext, tmp_path: Path, turns: int
) -> None:
    context, prompt = prompted(make_context, "hybrid")
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)

        async def keep(store: Store) -> None:
            with contextlib.suppress(kvferry.KvferryError):  # the store is closed
                await store.keep(llama, 0, prompt)

        async with anyio.create_task_group() as tasks, store_in(tmp_path) as store:
            tasks.start_soon(keep, store)
            for _ in range(turns):
                await anyio.lowlevel.checkpoint()
