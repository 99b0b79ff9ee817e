"""Store.explain: what is known of a prompt, what a restore would do, and why. Speeds are given."""

from __future__ import annotations

from pathlib import Path

import kvferry
import pytest
from disk_stores import BLOCK, TOKENS, HangingDisk, kept_in, prompted, store_in
from given_speeds import MIB, evaluates, loads, reads
from kvferry import Store
from kvferry.store import Explanation
from kvferry.store.objects import Unavailable
from support.devices import DEVICES
from support.event_loops import anyio_backend  # noqa: F401
from support.faulty_objects import FaultyObjects
from support.like_contexts import CACHES, MakeContext

pytestmark = pytest.mark.anyio


def store_of_ram(salt: bytes = b"") -> Store:
    return Store(ram="64 MiB", block_tokens=BLOCK, salt=salt)


def remote_store(objects: FaultyObjects) -> Store:
    return Store(ram="64 MiB", remote=objects, block_tokens=BLOCK)  # type: ignore[arg-type]


def only_reason(explanation: Explanation) -> str:
    (reason,) = explanation.not_found
    assert f"not found: {reason}" in str(explanation)
    return reason


# ---- What is known, and the decision -------------------------------------------------------------


async def test_tokens_and_bytes_of_each_tier(make_context: MakeContext, tmp_path: Path) -> None:
    async with (
        kept_in(tmp_path, make_context, "llama") as (_, llama, prompt),
        store_in(tmp_path) as store,
    ):
        await store.restore(llama, 1, prompt[: BLOCK + 1])
        told = await store.explain(llama, prompt, leave=0)
        ram, disk = told.shares
        assert (told.tokens, told.held, told.known, told.restored) == (
            TOKENS,
            0,
            TOKENS,
            TOKENS,
        )
        assert (ram.tier, ram.tokens, ram.seconds) == ("ram", BLOCK, 0.0)
        assert (disk.tier, disk.tokens, disk.seconds) == ("disk", TOKENS - BLOCK, None)
        assert ram.nbytes == llama.block_size(BLOCK)
        assert disk.nbytes == 2 * ram.nbytes + llama.block_size(TOKENS - 3 * BLOCK)
        assert told.prefill_seconds is told.bring_seconds is None
        assert told.not_found == ()
        assert "prefill is not known yet" in told.why
        assert "speed not known yet" in str(told)


async def test_what_it_takes_and_why(make_context: MakeContext, tmp_path: Path) -> None:
    async with (
        kept_in(tmp_path, make_context, "llama") as (_, llama, prompt),
        store_in(tmp_path) as store,
    ):
        evaluates(store, llama)
        told = await store.explain(llama, prompt, leave=0)
        assert (told.restored, told.why) == (TOKENS, "the speed of disk is not known yet")
        reads(store, "disk", 0.01, 0.001)
        told = await store.explain(llama, prompt, leave=0)
        assert (told.restored, told.why) == (TOKENS, "the speed of load is not known yet")
        loads(store, llama, 0.002)
        told = await store.explain(llama, prompt, leave=0)
        (disk,) = told.shares
        size = disk.nbytes / MIB
        assert disk.latency == pytest.approx(0.01)
        assert disk.bandwidth == pytest.approx(1000 * MIB)
        assert disk.seconds == pytest.approx(0.01 + 0.001 * size)
        assert told.load_seconds == pytest.approx(0.002 * size)
        assert told.bring_seconds == pytest.approx(0.01 + 0.003 * size)
        assert told.prefill_seconds == pytest.approx(0.2)
        assert told.restored == TOKENS
        assert told.why.startswith("it takes less than prefill")
        assert "latency 10 ms, 1,000 MiB/s" in str(told)
        held = await store.explain(llama, prompt, leave=0, held=190)
        assert held.prefill_seconds == pytest.approx(0.01)
        assert held.restored == 0
        assert held.why.startswith("it takes more than prefill")
        assert (await store.explain(llama, prompt, leave=0, held=TOKENS)).why == (
            "the sequence holds as many"
        )


@pytest.mark.parametrize("kind", ["llama", "hybrid", "mamba"])
@pytest.mark.parametrize("disk_latency", [0.0, 0.05, 0.15, 10.0])
async def test_it_tells_what_restore_does(
    make_context: MakeContext, tmp_path: Path, kind: str, disk_latency: float
) -> None:
    context, prompt = prompted(make_context, kind)
    turn = context.model.prompt(100, seed=3)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        async with store_in(tmp_path) as store:
            await store.keep(llama, 0, prompt)
            await llama.run(context.decode, 0, turn)
            await store.keep(llama, 0, prompt + turn)
        async with store_in(tmp_path) as store:
            store.prefetch(llama, prompt)
            while (await store.find(llama, prompt, leave=0)).tier != "ram":
                await llama.run(lambda: None)
            evaluates(store, llama)
            reads(store, "disk", disk_latency, 0.0)
            told = await store.explain(llama, prompt + turn, leave=0)
            assert told.known == TOKENS + 100
            count = await store.restore(llama, 1, prompt + turn, leave=0)
            assert told.restored == count
            if disk_latency in (0.0, 10.0):
                near = TOKENS if kind != "llama" else 3 * BLOCK
                assert count == (TOKENS + 100 if disk_latency == 0.0 else near)


async def test_a_trial_is_told(make_context: MakeContext, tmp_path: Path) -> None:
    context, prompt = prompted(make_context, "llama")
    now = 0.0
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        async with store_in(tmp_path) as store:
            await store.keep(llama, 0, prompt)
        async with store_in(tmp_path) as store:
            store._worth.tier("disk")._clock = lambda: now
            evaluates(store, llama)
            reads(store, "disk", 1.0, 0.0)
            assert (await store.explain(llama, prompt)).restored == 0
            now = 1000.0
            for _ in range(2):  # to explain is no trial
                told = await store.explain(llama, prompt)
                assert told.restored == 3 * BLOCK
                assert told.why.startswith("it is slower, but is measured again")


# ---- What was not found --------------------------------------------------------------------------


async def test_nothing_is_kept(make_context: MakeContext) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine, store_of_ram() as store:
        told = await store.explain(engine.attach(context.address), prompt)
        assert (told.known, told.shares, told.why) == (0, (), "nothing is known")
        assert told.not_found == ()
        fresh = engine.attach(make_context("llama").address)
        assert "kept for this model" in only_reason(await store.explain(fresh, prompt))


async def test_an_opaque_cache(make_context: MakeContext) -> None:
    context, prompt = prompted(make_context, "deepseek4")
    async with kvferry.Engine(DEVICES) as engine, store_of_ram() as store:
        told = await store.explain(engine.attach(context.address), prompt)
        assert "not known to kvferry" in only_reason(told)


async def test_expired(make_context: MakeContext) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine, store_of_ram() as store:
        llama = engine.attach(context.address)
        await store.keep(llama, 0, prompt[: 2 * BLOCK])
        await store.keep(llama, 0, prompt, ttl=0.0)
        told = await store.explain(llama, prompt, leave=0)
        assert told.known == 2 * BLOCK
        assert "the time of 2 parts in RAM is over" in only_reason(told)


async def test_in_quarantine(make_context: MakeContext, tmp_path: Path) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        async with store_in(tmp_path) as store:
            await store.keep(llama, 0, prompt)
            (second,) = (part for part in store._ram if part.description.begin == BLOCK)
            name = second.description.key.hex()
        path = tmp_path / "parts" / f"{name}.block"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        async with store_in(tmp_path) as store:
            assert await store.restore(llama, 1, prompt) == BLOCK
            told = await store.explain(llama, prompt)
            assert told.known == BLOCK
            assert "damaged on the disk and put in quarantine: 1 part" in only_reason(told)


async def test_damaged_in_the_object_store(make_context: MakeContext) -> None:
    context, prompt = prompted(make_context, "llama")
    objects = FaultyObjects()
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        async with remote_store(objects) as store:
            await store.keep(llama, 0, prompt)
        objects.change = lambda _, data: data[:-1] + bytes([data[-1] ^ 1])
        async with remote_store(objects) as store:
            assert await store.restore(llama, 1, prompt) == 0
            assert "damaged in the object store: 3 parts" in only_reason(
                await store.explain(llama, prompt)
            )


async def test_left_alone(make_context: MakeContext) -> None:
    context, prompt = prompted(make_context, "llama")
    objects = FaultyObjects()

    def fail(_: int) -> None:
        raise Unavailable("a fault of the test")

    objects.fault = fail
    async with kvferry.Engine(DEVICES) as engine, remote_store(objects) as store:
        llama = engine.attach(context.address)
        while not store._away.remote.left_alone:  # type: ignore[union-attr]
            await store.find(llama, prompt)
        assert "left alone" in only_reason(await store.explain(llama, prompt))


async def test_a_disk_that_hangs(
    make_context: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, prompt = prompted(make_context, "llama")
    disk = HangingDisk(monkeypatch)
    async with kvferry.Engine(DEVICES) as engine, store_in(tmp_path) as store:
        llama = engine.attach(context.address)
        await store.keep(llama, 0, prompt)
        await store.flush()
        disk.begin()
        store.clear()
        try:
            await store.restore(llama, 1, prompt)
            assert "the disk hangs" in only_reason(await store.explain(llama, prompt))
        finally:
            disk.end()


async def test_kept_for_another_variant(make_context: MakeContext) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine, store_of_ram(b"a") as store:
        adapted = engine.attach(context.address, variant="an adapter")
        await store.keep(adapted, 0, prompt)
        llama = engine.attach(context.address)
        told = await store.explain(llama, prompt, leave=0)
        assert only_reason(told) == "200 tokens are kept for another model or variant"
        assert told.known == 0
        # Where no more is kept than is known, that is no reason.
        await store.keep(llama, 0, prompt)
        more = [*prompt, 1, 2, 3]
        assert (await store.explain(llama, more, leave=0)).not_found == ()
        # Another owner is told nothing.
        assert (await store.explain(llama, prompt, leave=0, salt=b"b")).not_found == ()


async def test_kept_for_another_cache(make_context: MakeContext) -> None:
    context, prompt = prompted(make_context, "llama")
    other = make_context("llama", **{"n_ctx": 1024, **CACHES["q8_0"]})
    other.decode(0, [1, 2, 3])
    async with kvferry.Engine(DEVICES) as engine, store_of_ram() as store:
        await store.keep(engine.attach(context.address), 0, prompt)
        told = await store.explain(engine.attach(other.address), prompt, leave=0)
        assert only_reason(told) == "200 tokens are kept for a cache of other types or layout"


async def test_blocks_without_a_checkpoint(make_context: MakeContext) -> None:
    context, prompt = prompted(make_context, "hybrid")
    async with kvferry.Engine(DEVICES) as engine, store_of_ram() as store:
        llama = engine.attach(context.address)
        await store.keep(llama, 0, prompt)
        told = await store.explain(llama, [*prompt[: 3 * BLOCK], 1, 2, 3])
        assert told.known == 0
        assert "the blocks of 192 tokens are kept, but no checkpoint" in only_reason(told)
