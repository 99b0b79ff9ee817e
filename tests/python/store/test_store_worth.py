"""Store: what is not worth its restore, and a restore of what was found. The speeds are given: no
test waits for a clock."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import kvferry
import pytest
from disk_stores import BLOCK, TOKENS, kept_in, prompted, store_in
from given_speeds import evaluates, reads
from kvferry import Store
from kvferry.store.prefix import Search
from support.devices import DEVICES
from support.event_loops import anyio_backend  # noqa: F401
from support.faulty_objects import FaultyObjects
from support.like_contexts import MakeContext
from support.s3_server import BUCKET, Proxy

pytestmark = pytest.mark.anyio


def remote_store(objects: FaultyObjects, ram: str = "64 MiB") -> Store:
    return Store(ram=ram, remote=objects, block_tokens=BLOCK)  # type: ignore[arg-type]


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[Search]:
    """The searches that were made."""
    made: list[Search] = []
    run = Search.run

    def noted(search: Search) -> object:
        made.append(search)
        return run(search)

    monkeypatch.setattr(Search, "run", noted)
    return made


# ---- Worth it ------------------------------------------------------------------------------------


async def test_a_slow_object_store_is_not_read(make_context: MakeContext) -> None:
    context, prompt = prompted(make_context, "llama")
    objects = FaultyObjects()
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        async with remote_store(objects) as store:
            await store.keep(llama, 0, prompt)
        async with remote_store(objects) as store:
            reads(store, "remote", 1000.0)
            evaluates(store, llama)
            assert (await store.find(llama, prompt)).tokens == 3 * BLOCK
            assert await store.restore(llama, 0, prompt) == 0
            assert context.pos_max(0) == -1
            assert store.stats()["read_bytes"] == 0


async def test_what_is_near_is_restored_where_the_rest_is_too_far(
    make_context: MakeContext, tmp_path: Path
) -> None:
    async with (
        kept_in(tmp_path, make_context, "llama") as (context, llama, prompt),
        store_in(tmp_path) as store,
    ):
        assert await store.restore(llama, 1, prompt[: BLOCK + 1]) == BLOCK
        reads(store, "disk", 1000.0)
        evaluates(store, llama)
        assert await store.restore(llama, 1, prompt, leave=0) == BLOCK
        assert context.pos_max(1) == BLOCK - 1


async def test_a_nearer_checkpoint_is_restored_where_the_last_one_is_too_far(
    make_context: MakeContext, tmp_path: Path
) -> None:
    context, prompt = prompted(make_context, "hybrid")
    turn = context.model.prompt(100, seed=3)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        async with store_in(tmp_path) as store:
            await store.keep(llama, 0, prompt)
            await llama.run(context.decode, 0, turn)
            await store.keep(llama, 0, prompt + turn)
        async with store_in(tmp_path) as store:
            assert await store.restore(llama, 1, prompt, leave=0) == TOKENS
            reads(store, "disk", 1000.0)
            evaluates(store, llama)
            assert (await store.find(llama, prompt + turn, leave=0)).tokens == TOKENS + 100
            assert await store.restore(llama, 1, prompt + turn, leave=0) == TOKENS


async def test_a_slow_disk_that_is_fast_now_is_found_out(
    make_context: MakeContext, tmp_path: Path
) -> None:
    context, prompt = prompted(make_context, "llama")
    later = 0.0
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        async with store_in(tmp_path) as store:
            await store.keep(llama, 0, prompt)
        async with store_in(tmp_path) as store:
            evaluates(store, llama)
            clock = store._worth.clock
            store._worth.tier("disk")._clock = lambda: clock() + later
            reads(store, "disk", 1e9)
            assert await store.restore(llama, 1, prompt) == 0
            later = 1e12
            assert await store.restore(llama, 1, prompt) == 3 * BLOCK
            store.clear()
            told = await store.explain(llama, prompt)
            assert (told.restored, told.why) == (3 * BLOCK, "the speed of disk is not known yet")


async def test_the_store_measures_what_it_reads_and_loads(
    make_context: MakeContext, tmp_path: Path
) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        async with store_in(tmp_path) as store:
            await store.keep(llama, 0, prompt)
            await store.flush()
            for _ in range(3):
                assert store._worth.tier("disk").line() is None
                store.clear()
                await store.restore(llama, 1, prompt)
            assert store._worth.tier("disk").line() is not None
            assert store._worth.load(llama).line() is not None
            assert store._worth.tier("remote").line() is None


async def test_a_network_that_is_slow_is_left(make_context: MakeContext, network: Proxy) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        async with Store(ram="64 MiB", remote=f"s3://{BUCKET}", block_tokens=BLOCK) as store:
            await store.keep(llama, 0, prompt)
            await store.flush()
            evaluates(store, llama, 1e-6)
            network.delay = 0.01
            for _ in range(3):
                store.clear()
                assert await store.restore(llama, 1, prompt) == 3 * BLOCK
            store.clear()
            assert await store.restore(llama, 1, prompt) == 0
            told = await store.explain(llama, prompt)
            assert told.why.startswith("it takes more than prefill")
            for _ in range(3):
                evaluates(store, llama, 1e3)
            assert await store.restore(llama, 1, prompt) == 3 * BLOCK


async def test_a_prefetch_brings_it_all_the_same(make_context: MakeContext, tmp_path: Path) -> None:
    async with (
        kept_in(tmp_path, make_context, "llama") as (_, llama, prompt),
        store_in(tmp_path) as store,
    ):
        reads(store, "disk", 1000.0)
        evaluates(store, llama)
        store.prefetch(llama, prompt)
        while (await store.find(llama, prompt)).tier != "ram":
            await llama.run(lambda: None)


@pytest.mark.parametrize(
    "arguments", [(0, 1.0), (-1, 1.0), (10, 0.0), (10, -1.0), (10, float("nan"))]
)
async def test_a_prefill_that_makes_no_sense_is_refused(
    make_context: MakeContext, arguments: tuple[int, float]
) -> None:
    context, _ = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine, Store(ram=1) as store:
        with pytest.raises(kvferry.InvalidArgument):
            store.note_prefill(engine.attach(context.address), *arguments)


# ---- What the sequence holds already -------------------------------------------------------------


async def test_a_sequence_that_holds_as_much_stays_as_it_is(make_context: MakeContext) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine, store_of_ram() as store:
        llama = engine.attach(context.address)
        await store.keep(llama, 0, prompt)
        for held in (3 * BLOCK, 3 * BLOCK + 5):
            assert await store.restore(llama, 0, prompt, held=held) == held
            assert context.pos_max(0) == TOKENS - 1
        assert store.stats()["restored_tokens"] == 0
        assert await store.restore(llama, 0, prompt, held=3 * BLOCK - 1) == 3 * BLOCK
        assert context.pos_max(0) == 3 * BLOCK - 1
        # Another prompt: nothing is known of it, and nothing of the sequence is of use.
        assert await store.restore(llama, 0, [5, 6, 7], held=0) == 0
        assert context.pos_max(0) == 3 * BLOCK - 1


def store_of_ram() -> Store:
    return Store(ram="64 MiB", block_tokens=BLOCK)


# ---- What was found ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "hybrid"])
async def test_what_was_found_is_restored_without_a_search(
    make_context: MakeContext, tmp_path: Path, searches: list[Search], kind: str
) -> None:
    async with (
        kept_in(tmp_path, make_context, kind) as (context, llama, prompt),
        store_in(tmp_path) as store,
    ):
        found = await store.find(llama, prompt, leave=0)
        searches.clear()
        assert await store.restore(llama, 1, prompt, leave=0, found=found) == TOKENS
        nothing = await store.find(llama, [5, 6, 7])
        searches.clear()
        assert await store.restore(llama, 1, [5, 6, 7], found=nothing) == 0
        assert context.pos_max(1) == -1
        assert not searches


@pytest.mark.parametrize("on_disk", [False, True])
async def test_what_was_found_and_evicted_meanwhile_is_searched(
    make_context: MakeContext, tmp_path: Path, on_disk: bool
) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        async with store_in(tmp_path) if on_disk else store_of_ram() as store:
            await store.keep(llama, 0, prompt)
            await store.flush()
            found = await store.find(llama, prompt, leave=0)
            assert found.tier == "ram"
            store.clear()
            expected = TOKENS if on_disk else 0
            assert await store.restore(llama, 0, prompt, leave=0, found=found) == expected
            assert context.pos_max(0) == expected - 1


async def test_what_was_found_and_has_expired_meanwhile_is_not_restored(
    make_context: MakeContext,
) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine, store_of_ram() as store:
        llama = engine.attach(context.address)
        await store.keep(llama, 0, prompt, ttl=1000.0)
        found = await store.find(llama, prompt, leave=0)
        assert found.tokens == TOKENS
        for entry in store._ram:
            entry.expires = 0.0
        assert await store.restore(llama, 0, prompt, leave=0, found=found) == 0
        assert (await store.find(llama, prompt, leave=0)).tokens == 0


async def test_what_was_found_for_other_arguments_is_refused(make_context: MakeContext) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine, store_of_ram() as store:
        llama, again = engine.attach(context.address), engine.attach(context.address)
        await store.keep(llama, 0, prompt)
        found = await store.find(llama, prompt)
        others: list[Callable[[], Awaitable[int]]] = [
            lambda: store.restore(again, 1, prompt, found=found),
            lambda: store.restore(llama, 1, prompt, found=found, salt=b"another"),
            lambda: store.restore(llama, 1, [9, *prompt[1:]], found=found),
            lambda: store.restore(llama, 1, prompt[:BLOCK], found=found),
            lambda: store.restore(llama, 1, prompt, found=kvferry.Found(3 * BLOCK, 1, "ram")),
        ]
        for other in others:
            with pytest.raises(kvferry.InvalidArgument, match="found"):
                await other()
        # A prompt that goes on otherwise behind what was found has the same prefix.
        assert await store.restore(llama, 1, [*prompt[: 3 * BLOCK], 9], found=found) == 3 * BLOCK
