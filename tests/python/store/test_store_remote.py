"""Store with an object store: what is kept is found by other stores, on other machines too."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import kvferry
import numpy as np
import obstore.store
import pytest
from disk_stores import BLOCK, TOKENS, prompted
from kvferry import Store
from kvferry.store.objects import Refused, Unavailable
from kvferry.store.part_format import HEADER_BYTES
from kvferry.store.remote import Remote
from new_process import assert_a_new_process_goes_on
from support.devices import DEVICES
from support.event_loops import EVENT_LOOPS
from support.faulty_objects import FaultyObjects
from support.like_contexts import MakeContext
from support.llama_reference import Context
from support.s3_server import BUCKET, Proxy, S3Server

pytestmark = pytest.mark.anyio

KINDS = ["llama", "qwen2vl", "deepseek32", "gemma3", "hybrid", "mamba"]
URL = f"s3://{BUCKET}/kept"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def remote_store(
    remote: object = URL, ram: str = "64 MiB", salt: bytes = b"", disk: Path | None = None
) -> Store:
    return Store(
        ram=ram,
        remote=remote,  # type: ignore[arg-type]
        disk=disk,
        disk_limit="1 GiB" if disk else None,
        block_tokens=BLOCK,
        salt=salt,
    )


def equal(context: Context, like: Context, state: bytes) -> bool:
    """Whether a context has a state, and goes on as another one that was given it."""
    like.state_set(0, state)
    return context.state_get(0) == like.state_get(0) and np.array_equal(
        context.decode(0, [7]), like.decode(0, [7])
    )


@pytest.mark.parametrize("kind", KINDS)
async def test_another_store_finds_it_in_the_bucket(
    make_context: MakeContext, s3: S3Server, kind: str
) -> None:
    context, prompt = prompted(make_context, kind)
    state = context.state_get(0)
    fresh, like = (make_context(kind, n_ctx=1024) for _ in range(2))
    async with kvferry.Engine(DEVICES) as engine:
        async with remote_store() as store:
            assert await store.keep(engine.attach(context.address), 0, prompt) == TOKENS
        assert s3.objects()
        async with remote_store(salt=b"another") as store:
            llama = engine.attach(fresh.address)
            assert await store.find(llama, [*prompt, 7]) == kvferry.store.Found(0, 0, "")
            assert await store.restore(llama, 0, [*prompt, 7]) == 0
        async with remote_store() as store:
            llama = engine.attach(fresh.address)
            found = await store.find(llama, [*prompt, 7])
            assert (found.tokens, found.tier) == (TOKENS, "remote")
            assert await store.restore(llama, 0, [*prompt, 7]) == TOKENS
            assert (await store.find(llama, [*prompt, 7])).tier == "ram"
            assert store.stats()["ram_reserved"] == 0
            assert store.stats()["remote_calls_failed"] == 0
    assert equal(fresh, like, state)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
async def test_a_new_process_finds_it(
    make_context: MakeContext,
    model_path: Callable[..., Path],
    s3: S3Server,
    tmp_path: Path,
    kind: str,
) -> None:
    context, prompt = prompted(make_context, kind)
    state = context.state_get(0)
    async with kvferry.Engine(DEVICES) as engine, remote_store() as store:
        await store.keep(engine.attach(context.address), 0, prompt)
    like = make_context(kind, n_ctx=1024)
    assert_a_new_process_goes_on(model_path(kind), like, state, tmp_path, remote=URL)


async def test_two_stores_share_a_bucket(make_context: MakeContext, s3: S3Server) -> None:
    context, prompt = prompted(make_context, "gemma3")
    async with (
        kvferry.Engine(DEVICES) as engine,
        remote_store() as first,
        remote_store() as second,
    ):
        llama = engine.attach(context.address)
        assert await first.keep(llama, 0, prompt) == TOKENS
        await first.flush()
        written = first.stats()["remote_written_bytes"]
        assert written > 0
        assert await second.restore(llama, 1, prompt, leave=0) == TOKENS
        # What the other one has written is not sent again.
        assert await second.keep(llama, 0, prompt) == TOKENS
        await second.flush()
        assert second.stats()["remote_written_bytes"] == 0
        more = [*prompt, 5, 6]
        await llama.run(context.decode, 0, [5, 6])
        assert await second.keep(llama, 0, more) == TOKENS + 2
        await second.flush()
        first.clear()
        assert await first.restore(llama, 2, more, leave=0) == TOKENS + 2
        assert await first.restore(llama, 2, prompt, leave=0) == TOKENS


async def test_disk_and_bucket(make_context: MakeContext, s3: S3Server, tmp_path: Path) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        async with remote_store(disk=tmp_path / "a") as store:
            assert await store.keep(llama, 0, prompt) == TOKENS
        async with remote_store(disk=tmp_path / "a") as store:
            assert (await store.find(llama, prompt, leave=0)).tier == "disk"
            s3.stop()
            assert await store.restore(llama, 1, prompt, leave=0) == TOKENS
            s3.start()
        async with remote_store(disk=tmp_path / "b") as store:
            assert (await store.find(llama, prompt, leave=0)).tier == "remote"
            assert await store.restore(llama, 1, prompt, leave=0) == TOKENS
        # Some of the blocks are on the disk, the others in the bucket.
        path = next(iter((tmp_path / "a/parts").glob("*.block")))
        path.unlink()
        async with remote_store(disk=tmp_path / "a") as store:
            found = await store.find(llama, prompt, leave=0)
            assert (found.tokens, found.tier) == (TOKENS, "remote")
            assert await store.restore(llama, 1, prompt, leave=0) == TOKENS
            assert store.stats()["ram_reserved"] == 0


def damage(s3: S3Server) -> None:
    """Changes the last byte of every block and checkpoint."""
    paths = [path for path in s3.objects() if path.suffix in (".block", ".checkpoint")]
    assert paths
    for path in paths:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("kind", ["llama", "hybrid"])
async def test_damaged_objects_are_kept_again(
    make_context: MakeContext, s3: S3Server, kind: str
) -> None:
    context, prompt = prompted(make_context, kind)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        async with remote_store() as store:
            await store.keep(llama, 0, prompt)
        damage(s3)
        async with remote_store() as store:
            assert await store.restore(llama, 1, prompt, leave=0) == 0
            assert context.pos_max(1) == -1
            assert await store.keep(llama, 0, prompt) == TOKENS
        async with remote_store() as store:
            assert await store.restore(llama, 1, prompt, leave=0) == TOKENS


async def test_prefetch_brings_it_to_ram(make_context: MakeContext, s3: S3Server) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        async with remote_store() as store:
            await store.keep(llama, 0, prompt)
        async with remote_store() as store:
            store.prefetch(llama, prompt)
            for _ in range(1000):
                if (await store.find(llama, prompt)).tier == "ram":
                    break
                await anyio.sleep(0.01)
            s3.stop()
            assert await store.restore(llama, 1, prompt, leave=0) == TOKENS


async def test_a_server_that_hangs_slows_nobody_down(
    make_context: MakeContext, network: Proxy
) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        async with remote_store() as store:
            await store.keep(llama, 0, prompt)
        async with remote_store() as store:
            network.hangs = True
            for _ in range(3):  # three searches, until the server is left alone
                assert await store.restore(llama, 1, prompt) == 0
            connections = network.connections
            for _ in range(20):
                assert await store.restore(llama, 1, prompt) == 0
                assert await store.keep(llama, 0, prompt) == TOKENS
                assert await store.restore(llama, 1, prompt, leave=0) == TOKENS
                store.clear()
            await store.flush()
            assert network.connections == connections
            assert store.stats()["ram_reserved"] == 0
            network.hangs = False


@pytest.mark.parametrize("anyio_backend", EVENT_LOOPS.values(), ids=EVENT_LOOPS.keys())
async def test_a_server_that_stops_while_parts_are_read(
    make_context: MakeContext, network: Proxy
) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        async with remote_store() as store:
            await store.keep(llama, 0, prompt)
        async with remote_store() as store:
            found = await store.find(llama, prompt)
            assert found.tokens > 0
            network.cut_after = found.nbytes // 8
            assert await store.restore(llama, 1, prompt) < TOKENS
            network.cut_after = None
            for _ in range(100):
                if store.stats()["ram_reserved"] == 0:
                    break
                await anyio.sleep(0.05)
            assert store.stats()["ram_reserved"] == 0


async def test_a_failed_body_ends_the_writes(make_context: MakeContext, network: Proxy) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        network.hangs = True
        store = remote_store()

        async def failing() -> None:
            async with store:
                await store.keep(llama, 0, prompt)
                raise RuntimeError("body")

        with pytest.raises(RuntimeError, match="body"):
            await failing()
        assert store.stats()["remote_writes_failed"] == 0  # nothing waited for a timeout
        assert store.stats()["ram_used"] == 0
        assert store.stats()["remote_writes_pending"] == 0


async def test_too_much_that_waits_is_not_written(
    make_context: MakeContext, network: Proxy
) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        async with remote_store() as store:
            await store.keep(llama, 0, prompt)
            needed = store.stats()["ram_used"]
        network.delay = 0.2
        async with remote_store(f"{URL}2", ram=str(2 * needed)) as store:
            assert await store.keep(llama, 0, prompt) == TOKENS
            assert store.stats()["remote_writes_failed"] > 0
            network.delay = 0
            # A later call has the rest written, which is in RAM.
            for _ in range(10):
                await store.flush()
                await store.keep(llama, 0, prompt)
        async with remote_store(f"{URL}2") as store:
            assert await store.restore(llama, 1, prompt, leave=0) == TOKENS


async def test_an_object_store_of_the_program(make_context: MakeContext) -> None:
    context, prompt = prompted(make_context, "mamba")
    memory = obstore.store.MemoryStore()
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        async with remote_store(memory) as store:
            await store.keep(llama, 0, prompt)
        async with remote_store(memory) as store:
            assert await store.restore(llama, 1, prompt, leave=0) == TOKENS


def test_what_is_no_object_store() -> None:
    with pytest.raises(kvferry.InvalidArgument, match="remote"):
        Store(ram=1 << 20, remote="no-such-scheme://bucket")
    with pytest.raises(TypeError, match="remote"):
        Store(ram=1 << 20, remote=7)  # type: ignore[arg-type]


# ---- Faults at every call


def unavailable() -> None:
    raise Unavailable("a fault of the test")


def refused() -> None:
    raise Refused("a fault of the test")


def of_no_kind() -> None:
    raise RuntimeError("a fault of the test")


def late() -> None:
    time.sleep(1.3)


@pytest.mark.parametrize("fault", [unavailable, refused, of_no_kind, late])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
async def test_each_call_fails_once(
    make_context: MakeContext, kind: str, fault: Callable[[], None]
) -> None:
    context, prompt = prompted(make_context, kind)
    state = context.state_get(0)
    like = make_context(kind, n_ctx=1024)
    like.state_set(0, state)
    logits = like.decode(0, [7])
    whole = FaultyObjects()
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        async with remote_store(whole) as store:
            assert await store.keep(llama, 0, prompt) == TOKENS
        writes = whole.calls
        for failing in range(1, writes + 1, 3 if fault is late else 1):
            objects = FaultyObjects()
            objects.fault = lambda call, n=failing: fault() if call == n else None  # type: ignore[misc]
            async with remote_store(objects) as store:
                assert await store.keep(llama, 0, prompt) == TOKENS
                await store.flush()
                # A later call sends what has failed.
                assert await store.keep(llama, 0, prompt) == TOKENS
            assert objects.objects == whole.objects
        before = whole.calls
        async with remote_store(whole) as store:
            assert await store.restore(llama, 1, prompt, leave=0) == TOKENS
        for failing in range(1, whole.calls - before + 1, 2 if fault is late else 1):
            fresh = make_context(kind, n_ctx=1024)
            start = whole.calls
            whole.fault = lambda call, n=start + failing: fault() if call == n else None  # type: ignore[misc]
            async with remote_store(whole) as store:
                attached = engine.attach(fresh.address)
                first = await store.restore(attached, 0, prompt, leave=0)
                assert 0 <= first <= TOKENS
                whole.fault = lambda call: None
                assert await store.restore(attached, 0, prompt, leave=0) == TOKENS
            assert fresh.state_get(0) == state
            assert np.array_equal(fresh.decode(0, [7]), logits)
            await attached.detach()


def shorter(data: bytes) -> bytes:
    return data[:-1]


def nothing(data: bytes) -> bytes:
    return b""


def flipped(data: bytes) -> bytes:
    return bytes([*data[:-3], data[-3] ^ 4, *data[-2:]])


@pytest.mark.parametrize("harm", [shorter, nothing, flipped])
async def test_each_read_is_wrong(
    make_context: MakeContext, harm: Callable[[bytes], bytes]
) -> None:
    context, prompt = prompted(make_context, "hybrid")
    objects = FaultyObjects()
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        async with remote_store(objects) as store:
            assert await store.keep(llama, 0, prompt) == TOKENS
        before = objects.calls
        async with remote_store(objects) as store:
            assert await store.restore(llama, 1, prompt, leave=0) == TOKENS
        for wrong in range(1, objects.calls - before + 1):
            start = objects.calls
            objects.change = (  # type: ignore[misc]
                lambda call, data, n=start + wrong: harm(data) if call == n else data
            )
            async with remote_store(objects) as store:
                # A prefix of the hybrid cache is restored whole or not at all.
                count = await store.restore(llama, 1, prompt, leave=0)
                assert count in (0, TOKENS)
                assert context.pos_max(1) == count - 1


# ---- A bucket that others write to


async def test_a_note_of_many_caches_makes_no_search_long(make_context: MakeContext) -> None:
    context, prompt = prompted(make_context, "llama")
    fresh = make_context("llama", n_ctx=1024)
    objects = FaultyObjects()
    async with kvferry.Engine(DEVICES) as engine:
        async with remote_store(objects) as store:
            await store.keep(engine.attach(context.address), 0, prompt)
        (note,) = [name for name in objects.objects if name.endswith(".layouts")]
        true = objects.objects[note][HEADER_BYTES:]
        others = b"".join(bytes([n]) * 32 + true[32:] for n in range(200))
        model = bytes.fromhex(note.partition(".")[0])
        assert await Remote(objects).write_note("layouts", model, true + others)
        calls = objects.calls
        objects.fault = lambda call: time.sleep(0.03)
        async with remote_store(objects) as store:
            found = await store.find(engine.attach(fresh.address), [*prompt, 7])
            assert found.tokens == TOKENS
        assert objects.calls - calls < 200  # one search; one for each cache makes 400


async def test_a_bucket_that_is_read_only(make_context: MakeContext) -> None:
    context, prompt = prompted(make_context, "llama")
    objects = FaultyObjects()
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        async with remote_store(objects) as store:
            await store.keep(llama, 0, prompt)

        three = threading.Barrier(3)

        def refused(name: str, nbytes: int, pieces: Iterator[memoryview]) -> None:
            with contextlib.suppress(threading.BrokenBarrierError):
                three.wait(timeout=1)  # one after the other, with no successful call between
            raise Refused("403 Forbidden")

        objects.put = refused  # type: ignore[method-assign]
        async with remote_store(objects) as store:
            assert await store.keep(llama, 0, prompt, salt=b"another") == TOKENS
            await store.flush()
            store.clear()
            assert await store.restore(llama, 1, prompt, leave=0) == TOKENS
            assert store.stats()["remote_writes_failed"] > 0
