"""A real Mooncake Store behind the remote tier."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import kvferry
import numpy as np
import pytest
from disk_stores import BLOCK, TOKENS, prompted
from kvferry import Store
from kvferry.store.mooncake import MooncakeObjects
from kvferry.store.objects import PIECE_BYTES, Full, Refused, Unavailable
from support.devices import DEVICES
from support.like_contexts import MakeContext
from support.mooncake_server import SEGMENT_BYTES, MooncakeServer, mooncake_server

HEADER = 4096


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def server() -> Iterator[MooncakeServer]:
    """For tests that stop or fill it."""
    with mooncake_server() as server:
        yield server


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[MooncakeServer, Any]]:
    """A server, and a client that has room for objects: each takes a second to close."""
    with mooncake_server() as server:
        yield server, server.client(SEGMENT_BYTES)


@pytest.fixture
def objects(
    shared: tuple[MooncakeServer, Any], request: pytest.FixtureRequest
) -> Iterator[MooncakeObjects]:
    with MooncakeObjects(shared[1], f"{request.node.name}/") as objects:
        yield objects


@pytest.fixture
def own(server: MooncakeServer) -> Iterator[MooncakeObjects]:
    """The objects of ``server``."""
    with MooncakeObjects(server.client(SEGMENT_BYTES)) as objects:
        yield objects
        server.resume()


def put(objects: MooncakeObjects, name: str, *pieces: bytes) -> None:
    objects.put(name, sum(map(len, pieces)), iter([memoryview(piece) for piece in pieces]))


def content(nbytes: int) -> bytes:
    return np.random.default_rng(nbytes).bytes(nbytes)


@pytest.mark.parametrize("nbytes", [HEADER, HEADER + 1, PIECE_BYTES, 3 * PIECE_BYTES + 17])
def test_what_is_put_is_got(objects: MooncakeObjects, nbytes: int) -> None:
    data = content(nbytes)
    assert objects.sizes(["a.block"]) == [None]
    put(objects, "a.block", data[:HEADER], data[HEADER:])
    assert objects.sizes(["b.block", "a.block"]) == [None, nbytes]
    got = bytearray(nbytes + 9)
    for begin in range(0, nbytes, PIECE_BYTES):
        piece = memoryview(got)[begin : begin + PIECE_BYTES]
        expected = min(len(piece), nbytes - begin)
        assert objects.get("a.block", begin, [piece[:5], piece[5:]]) == expected
    assert got == data + bytes(9)


def test_a_read_that_begins_at_the_end(objects: MooncakeObjects) -> None:
    put(objects, "a.block", content(HEADER))
    memory = bytearray(7)
    assert objects.get("a.block", HEADER, [memoryview(memory)]) == 0
    assert objects.get("a.block", HEADER + 10, [memoryview(memory)]) == 0
    assert memory == bytes(7)


def test_an_object_is_replaced(objects: MooncakeObjects) -> None:
    put(objects, "a.ends", content(HEADER))
    put(objects, "a.ends", content(HEADER + 8))
    memory = bytearray(2 * HEADER)
    assert objects.get("a.ends", 0, [memoryview(memory)]) == HEADER + 8
    assert memory[: HEADER + 8] == content(HEADER + 8)


def test_removed_objects_are_missing(objects: MooncakeObjects) -> None:
    put(objects, "a.block", content(HEADER))
    objects.get("a.block", 0, [memoryview(bytearray(HEADER))])
    objects.delete(["a.block", "b.block"])
    with pytest.raises(FileNotFoundError):
        objects.get("a.block", 0, [memoryview(bytearray(HEADER))])


def test_prefixes_do_not_mix(shared: tuple[MooncakeServer, Any]) -> None:
    client = shared[1]
    with MooncakeObjects(client, "one/") as one, MooncakeObjects(client, "another/") as another:
        put(one, "a.block", content(HEADER))
        assert another.sizes(["a.block"]) == [None]


def test_another_client_reads_it(shared: tuple[MooncakeServer, Any]) -> None:
    server, client = shared
    with MooncakeObjects(client) as one, MooncakeObjects(server.client()) as another:
        put(one, "a.block", content(HEADER))
        memory = bytearray(HEADER)
        assert another.get("a.block", 0, [memoryview(memory)]) == HEADER
        assert memory == content(HEADER)


def test_objects_that_are_closed_leave_no_buffer(shared: tuple[MooncakeServer, Any]) -> None:
    """Mooncake takes no buffer that overlaps a registered one."""
    memory = bytearray(HEADER)
    for _ in range(5):
        with MooncakeObjects(shared[1]) as objects:
            put(objects, "a.block", content(HEADER))
            assert objects.get("a.block", 0, [memoryview(memory)]) == HEADER


def test_no_room(server: MooncakeServer) -> None:
    objects = MooncakeObjects(server.client(16 << 20))
    put(objects, "a.block", bytes(12 << 20))
    with pytest.raises(Full, match="no room"):
        put(objects, "b.block", bytes(12 << 20))


def test_a_buffer_that_is_too_small(server: MooncakeServer) -> None:
    objects = MooncakeObjects(server.client(SEGMENT_BYTES, buffer_bytes=1 << 20))
    with pytest.raises(Refused, match="local_buffer_size"):
        put(objects, "a.block", bytes(2 << 20))


def test_pieces_that_end_leave_no_object(objects: MooncakeObjects) -> None:
    def cancelled() -> Iterator[memoryview]:
        yield memoryview(bytes(HEADER))
        raise Refused("the upload was cancelled")

    with pytest.raises(Refused, match="cancelled"):
        objects.put("a.block", 2 * HEADER, cancelled())
    assert objects.sizes(["a.block"]) == [None]


def test_many_threads(objects: MooncakeObjects) -> None:
    """Each has a buffer of its own."""
    wrong = []
    names = [f"{n}.block" for n in range(8)]
    for n, name in enumerate(names):
        put(objects, name, bytes([n]) * (1 << 20))

    def reads(n: int) -> None:
        memory = bytearray(1 << 20)
        for _ in range(20):
            objects.get(names[n], 0, [memoryview(memory)])
            if memory.count(n) != 1 << 20:
                wrong.append(n)

    threads = [threading.Thread(target=reads, args=[n]) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_master_that_ended(server: MooncakeServer, own: MooncakeObjects) -> None:
    put(own, "a.block", content(HEADER))
    server.stop()
    with pytest.raises(Unavailable):
        own.sizes(["a.block"])
    with pytest.raises(Unavailable):
        own.get("a.block", 0, [memoryview(bytearray(HEADER))])
    with pytest.raises(Unavailable):
        put(own, "b.block", content(HEADER))


def test_a_close_waits_for_calls(server: MooncakeServer, own: MooncakeObjects) -> None:
    put(own, "a.block", content(HEADER))
    sizes, closed = [], threading.Event()

    def asks() -> None:
        sizes.append(own.sizes(["b.block"]))

    def closes() -> None:
        own.close()
        closed.set()

    server.suspend()
    threads = [threading.Thread(target=asks)]
    threads[0].start()
    while not own.running:
        time.sleep(0.001)
    threads.append(threading.Thread(target=closes))
    threads[1].start()
    assert not closed.wait(0.2)
    server.resume()
    for thread in threads:
        thread.join()
    assert sizes == [[None]]
    with pytest.raises(Refused, match="closed"):
        own.sizes(["a.block"])


def store_of(objects: MooncakeObjects) -> Store:
    return Store(ram="64 MiB", remote=objects, block_tokens=BLOCK)


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["llama", "gemma3", "mamba"])
async def test_another_store_finds_it(
    make_context: MakeContext, shared: tuple[MooncakeServer, Any], kind: str
) -> None:
    server, client = shared
    objects, other = (MooncakeObjects(each, f"{kind}/") for each in (client, server.client()))
    context, prompt = prompted(make_context, kind)
    state = context.state_get(0)
    fresh = make_context(kind, n_ctx=1024)
    async with kvferry.Engine(DEVICES) as engine:
        async with store_of(objects) as store:
            assert await store.keep(engine.attach(context.address), 0, prompt) == TOKENS
        async with store_of(other) as store:
            llama = engine.attach(fresh.address)
            found = await store.find(llama, [*prompt, 7])
            assert (found.tokens, found.tier) == (TOKENS, "remote")
            assert await store.restore(llama, 0, [*prompt, 7]) == TOKENS
            assert fresh.state_get(0) == state
    objects.close()
    other.close()


@pytest.mark.anyio
async def test_a_master_that_hangs_is_left_alone(
    make_context: MakeContext, server: MooncakeServer, own: MooncakeObjects
) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        async with store_of(own) as store:
            await store.keep(llama, 0, prompt)
        async with store_of(own) as store:
            server.suspend()
            for _ in range(4):
                assert await store.restore(llama, 1, prompt) == 0
            assert await store.keep(llama, 0, prompt) == TOKENS
            assert await store.restore(llama, 1, prompt, leave=0) == TOKENS
            server.resume()
