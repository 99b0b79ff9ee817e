"""The remote tier on a real S3 server: what is put is got, and nothing that is not right."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import anyio
import kvferry.store.part_format as part_format
import pytest
import xxhash
from disk_parts import make_part
from kvferry.store.breaker import Breaker
from kvferry.store.description import Description
from kvferry.store.objects import PIECE_BYTES, Full, ObstoreObjects
from kvferry.store.remote import Remote
from support.faulty_objects import FaultyObjects
from support.s3_server import BUCKET, Proxy, S3Server

pytestmark = pytest.mark.anyio

SIZES = [0, 1, 1000, PIECE_BYTES, PIECE_BYTES + 1, 2 * PIECE_BYTES, 6 * PIECE_BYTES + 17]
URL = f"s3://{BUCKET}/a/prefix"


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    backend: str = request.param
    return backend


class Clock:
    """A clock that stands still until a test sets it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def remote(timeout: float = 5.0, breaker: Breaker | None = None, url: str = URL) -> Remote:
    objects = ObstoreObjects.from_url(url)
    return Remote(objects, timeout=timeout, find_timeout=min(1.0, timeout), breaker=breaker)


def file_of(s3: S3Server, part: Description) -> Path:
    return s3.bucket / "a/prefix" / part_format.name_of(part.kind, part.key)


async def read(tier: Remote, part: Description) -> bytes | None:
    memory = bytearray(part.nbytes)
    asked = dataclasses.replace(part, checksum=0)  # a search does not know the checksum
    found = await tier.read_into(asked, memoryview(memory))
    assert found in (None, part)
    return found and bytes(memory)


@pytest.mark.parametrize("nbytes", SIZES)
async def test_what_is_put_is_got(s3: S3Server, nbytes: int) -> None:
    part, data = make_part(1, nbytes)
    first, second = remote(), remote()
    assert await first.sizes([(part.kind, part.key)]) == [None]
    assert await first.write(part, data)
    for tier in (first, second):
        assert await tier.sizes([(part.kind, part.key)]) == [nbytes]
        assert await read(tier, part) == data
    assert file_of(s3, part).read_bytes() == part_format.header_of(part) + data
    assert not s3.uploads()


async def test_many_sizes_keep_their_order(s3: S3Server) -> None:
    tier = remote()
    parts = [make_part(number, 100 + number) for number in range(40)]
    for part, data in parts[::3]:
        assert await tier.write(part, data)
    found = await tier.sizes([(part.kind, part.key) for part, _ in parts])
    assert found == [None if n % 3 else 100 + n for n in range(40)]


async def test_a_part_that_is_there_is_not_sent_again(s3: S3Server) -> None:
    part, data = make_part(1)
    first, second = remote(), remote()
    assert await first.write(part, data)
    assert await second.write(part, data)
    assert first.written_bytes == 4096 + len(data)
    assert second.written_bytes == 0


async def test_missing_and_removed_parts(s3: S3Server) -> None:
    tier = remote()
    part, data = make_part(1, 3 * PIECE_BYTES)
    assert await read(tier, part) is None
    assert await tier.write(part, data)
    assert await tier.remove([(part.kind, part.key)])
    assert await tier.remove([(part.kind, part.key)])
    assert await read(tier, part) is None
    assert tier.failed == 0  # misses are no failures
    assert not s3.objects()


def truncated(content: bytes) -> bytes:
    return content[:-1]


def without_data(content: bytes) -> bytes:
    return content[: part_format.HEADER_BYTES]


def half_a_header(content: bytes) -> bytes:
    return content[:100]


def empty(content: bytes) -> bytes:
    return b""


def flipped_header(content: bytes) -> bytes:
    return content[:40] + bytes([content[40] ^ 1]) + content[41:]


def flipped_data(content: bytes) -> bytes:
    return content[:-7] + bytes([content[-7] ^ 0x80]) + content[-6:]


def foreign(content: bytes) -> bytes:
    return os.urandom(len(content))


def of_another_key(content: bytes) -> bytes:
    part, data = make_part(99, len(content) - part_format.HEADER_BYTES)
    return part_format.header_of(part) + data


@pytest.mark.parametrize(
    "harm",
    [
        truncated,
        without_data,
        half_a_header,
        empty,
        flipped_header,
        flipped_data,
        foreign,
        of_another_key,
    ],
)
@pytest.mark.parametrize("nbytes", [1000, PIECE_BYTES + 5])
async def test_what_is_not_right_is_not_read(
    s3: S3Server, caplog: pytest.LogCaptureFixture, harm: object, nbytes: int
) -> None:
    tier = remote()
    part, data = make_part(1, nbytes)
    assert await tier.write(part, data)
    path = file_of(s3, part)
    path.write_bytes(harm(path.read_bytes()))  # type: ignore[operator]
    assert await read(tier, part) is None
    assert len(caplog.records) >= 1
    assert all(each.name == "kvferry.store" for each in caplog.records)
    # It may be written again.
    assert await tier.write(part, data)
    assert await read(tier, part) == data


async def test_another_parent_is_not_read(s3: S3Server) -> None:
    tier = remote()
    part, data = make_part(1)
    assert await tier.write(part, data)
    other = dataclasses.replace(part, parent=b"p" * 32)
    assert await read(tier, other) is None


async def test_a_newer_version_is_left_alone(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = remote()
    part, data = make_part(1)
    with monkeypatch.context() as newer:
        newer.setattr(part_format, "VERSION", 2)
        assert await tier.write(part, data)
    before = file_of(s3, part).read_bytes()
    assert await read(tier, part) is None
    assert not await tier.write(part, data)
    assert file_of(s3, part).read_bytes() == before


async def test_data_that_are_not_those_described(s3: S3Server) -> None:
    tier = remote()
    part, data = make_part(1)
    with pytest.raises(ValueError, match="length"):
        await tier.write(part, data[1:])
    with pytest.raises(ValueError, match="length"):
        await tier.read_into(part, memoryview(bytearray(part.nbytes - 1)))


# ---- Notes


async def test_notes(s3: S3Server) -> None:
    tier = remote()
    key = xxhash.xxh128_digest(b"note") * 2
    assert await tier.note("ends", key) is None
    for content in (b"", b"first", b"another, longer", bytes(1 << 16)):
        assert await tier.write_note("ends", key, content)
        assert await remote().note("ends", key) == content
    with pytest.raises(ValueError, match="long"):
        await tier.write_note("ends", key, bytes((1 << 16) + 1))
    (path,) = s3.objects()
    path.write_bytes(flipped_data(path.read_bytes()))
    assert await tier.note("ends", key) is None
    assert await tier.write_note("ends", key, b"again")
    assert await tier.note("ends", key) == b"again"


# ---- Faults


async def test_the_server_stops_and_starts(s3: S3Server, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    tier = remote(breaker=Breaker("the server", seconds=10, clock=clock))
    part, data = make_part(1)
    other, other_data = make_part(2)
    assert await tier.write(part, data)
    s3.stop()
    assert await read(tier, part) is None
    assert await tier.sizes([(part.kind, part.key)]) == [None]
    assert not await tier.write(other, other_data)
    assert tier.opened == 1
    assert "is left alone for" in caplog.text
    s3.start()
    assert await read(tier, part) is None
    clock.now += 11
    assert await read(tier, part) == data
    assert await tier.write(other, other_data)
    assert not tier.left_alone
    assert "works again" in caplog.text


async def test_a_server_that_hangs_is_left_alone(network: Proxy) -> None:
    clock = Clock()
    tier = remote(timeout=0.3, breaker=Breaker("the server", failures=3, clock=clock))
    part, data = make_part(1)
    assert await remote().write(part, data)
    network.hangs = True
    assert await read(tier, part) is None
    assert tier.left_alone
    connections = network.connections
    for _ in range(100):
        assert await read(tier, part) is None
        assert await tier.sizes([(part.kind, part.key)]) == [None]
        assert not await tier.write(*make_part(2))
    assert network.connections == connections


async def test_a_search_waits_for_one_timeout(network: Proxy) -> None:
    tier = remote()
    network.hangs = True
    with anyio.fail_after(20):  # one timeout for each name would take 30 seconds
        assert await tier.sizes([("block", bytes([n]) * 32) for n in range(30)]) == [None] * 30


async def test_a_slow_network_is_waited_for(network: Proxy) -> None:
    tier = remote()
    part, data = make_part(1)
    network.delay = 0.1
    assert await tier.write(part, data)
    assert await read(tier, part) == data


@pytest.mark.parametrize("nbytes", [PIECE_BYTES, 6 * PIECE_BYTES])
async def test_a_connection_that_is_cut(s3: S3Server, network: Proxy, nbytes: int) -> None:
    tier = remote(breaker=Breaker("the server", failures=100))
    part, data = make_part(1, nbytes)
    network.cut_after = 1 << 20
    assert not await tier.write(part, data)
    assert not s3.objects()
    assert not s3.uploads()
    network.cut_after = None
    assert await tier.write(part, data)
    network.cut_after = 1 << 20
    assert await read(tier, part) is None
    network.cut_after = None
    assert await read(tier, part) == data


async def test_one_cut_is_tried_again(network: Proxy) -> None:
    tier = remote()
    part, data = make_part(1)
    network.cut_after, network.cuts = 10, 1
    assert await tier.write(part, data)
    assert network.cuts == 0
    assert await read(tier, part) == data


async def test_credentials_that_are_refused(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    tier = remote()
    part, data = make_part(1)
    assert not await tier.write(part, data)
    assert tier.failed == 1
    assert await read(tier, part) is None
    assert await tier.sizes([(part.kind, part.key)]) == [None]
    assert tier.left_alone
    assert "403" in caplog.text
    assert "another-secret" not in caplog.text
    assert all("\n" not in each.getMessage() for each in caplog.records)


async def test_no_room_for_writes_does_not_stop_reads() -> None:
    objects = FaultyObjects()
    tier = Remote(objects, breaker=Breaker("the server", failures=1))
    part, data = make_part(1)
    assert await tier.write(part, data)
    put = objects.put

    def full(name: str, nbytes: int, pieces: Iterator[memoryview]) -> None:
        objects.calls += 1
        raise Full("no room")

    objects.put = full  # type: ignore[method-assign]
    for n in range(2, 12):
        calls = objects.calls
        assert not await tier.write(*make_part(n))
        assert objects.calls == calls + 2  # is it there, and one attempt
    assert not tier.left_alone
    assert await read(tier, part) == data
    objects.put = put  # type: ignore[method-assign]
    assert await tier.write(*make_part(2))


async def test_a_bucket_that_does_not_exist(s3: S3Server) -> None:
    tier = remote(url="s3://no-such-bucket/prefix")
    part, data = make_part(1)
    assert not await tier.write(part, data)
    assert await read(tier, part) is None


async def test_a_cancelled_write_leaves_no_upload(s3: S3Server, network: Proxy) -> None:
    tier = remote()
    part, data = make_part(1, 12 * PIECE_BYTES)
    network.delay = 0.05
    with anyio.move_on_after(0.3) as scope:
        await tier.write(part, data)
    assert scope.cancelled_caught
    network.delay = 0
    for _ in range(500):
        if not s3.uploads():
            break
        await anyio.sleep(0.02)
    assert not s3.uploads()
    assert not file_of(s3, part).exists()
    assert await tier.write(part, data)


async def test_a_cancelled_read(network: Proxy) -> None:
    tier = remote()
    part, data = make_part(1, 4 * PIECE_BYTES)
    assert await tier.write(part, data)
    network.delay = 0.02
    with anyio.move_on_after(0.1) as scope:
        await read(tier, part)
    assert scope.cancelled_caught
    network.delay = 0
    assert await read(tier, part) == data
    assert not tier.left_alone


# ---- The breaker


def test_the_breaker(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    clock = Clock()
    breaker = Breaker("it", failures=3, seconds=10, longest=25, clock=clock)
    for _ in range(2):
        breaker.failed(breaker.enter(), "why")
    breaker.succeeded()  # failures count that follow each other
    for _ in range(3):
        assert not breaker.would_refuse
        breaker.failed(breaker.enter(), "why")
    assert breaker.would_refuse
    for seconds in (10, 20, 25, 25):
        clock.now += seconds - 0.1
        assert breaker.would_refuse
        clock.now += 0.2
        assert not breaker.would_refuse
        trial = breaker.enter()
        assert trial
        assert breaker.would_refuse  # one trial at a time
        breaker.failed(False, "a call from before it opened")
        assert breaker.would_refuse
        breaker.failed(trial, "why")
    clock.now += 26
    breaker.cancelled(breaker.enter())
    assert breaker.enter()
    breaker.succeeded()
    assert not breaker.would_refuse
    assert breaker.opened == 1
    for _ in range(3):
        breaker.failed(breaker.enter(), "why")
    clock.now += 10.1
    assert not breaker.would_refuse
