"""Measures the store's remote tier beside obstore alone, on an S3 server of this machine.

    make bench-store-remote
    make bench-store-remote ARGS="--parts 16 --mib 64 --rounds 9"

Both move the same parts to and from versitygw, whose files are in a temporary folder. The tier also
computes checksums, asks whether a part is there, and copies what it has read into memory that was
allocated before. obstore alone does what it does fastest of several ways. Each round measures both
in turn; a figure is a median, and the ratio is of medians.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import obstore
import xxhash
from kvferry.store.description import Description
from kvferry.store.objects import PIECE_BYTES, ObstoreObjects
from kvferry.store.part_format import HEADER_BYTES, header_of, name_of
from kvferry.store.remote import Remote
from obstore.store import S3Store

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/python"))
from support.s3_server import BUCKET, s3_server

WRITERS = 4
GOAL = 0.8

Way = Callable[[], Awaitable[object]]


def make_parts(count: int, nbytes: int) -> list[tuple[Description, memoryview]]:
    parts = []
    for number in range(count):
        data = memoryview(os.urandom(nbytes))
        key = number.to_bytes(32, "little")
        checksum = xxhash.xxh64_intdigest(data)
        part = Description("block", key, key, 0, 256, bytes(32), nbytes, checksum)
        parts.append((part, data))
    return parts


class Measured:
    """The ways to move all parts. Writers take several parts at a time."""

    def __init__(self, url: str, parts: list[tuple[Description, memoryview]]) -> None:
        self.parts = parts
        self.objects = ObstoreObjects.from_url(url, timeout=60, put_timeout=60)
        self.store = S3Store.from_url(url, client_options={"allow_http": True})
        self.memories = [memoryview(bytearray(part.nbytes)) for part, _ in parts]

    def remote(self) -> Remote:
        """A new one, as a tier remembers nothing that matters here but failures."""
        return Remote(self.objects, timeout=60, find_timeout=60)

    def delete_all(self) -> None:
        obstore.delete(self.store, [name_of(part.kind, part.key) for part, _ in self.parts])

    async def tier_writes(self) -> None:
        tier = self.remote()
        await self.by_writers(tier.write)

    async def tier_reads(self) -> None:
        tier = self.remote()

        async def read(part: Description, memory: memoryview) -> None:
            if await tier.read_into(dataclasses.replace(part, checksum=0), memory) != part:
                raise RuntimeError("a part was not read")

        await asyncio.gather(
            *(
                read(part, memory)
                for (part, _), memory in zip(self.parts, self.memories, strict=True)
            )
        )

    async def puts(self, **how: object) -> None:
        async def put(part: Description, data: memoryview) -> bool:
            pieces = [header_of(part)]
            pieces += [
                data[begin : begin + PIECE_BYTES] for begin in range(0, len(data), PIECE_BYTES)
            ]
            await obstore.put_async(self.store, name_of(part.kind, part.key), pieces, **how)
            return True

        await self.by_writers(put)

    async def by_writers(self, write: Callable[[Description, memoryview], Awaitable[bool]]) -> None:
        waiting = iter(self.parts)

        async def writer() -> None:
            for part, data in waiting:
                if not await write(part, data):
                    raise RuntimeError("a part was not written")

        await asyncio.gather(*(writer() for _ in range(WRITERS)))

    async def whole_gets(self) -> None:
        async def get(part: Description) -> None:
            result = await obstore.get_async(self.store, name_of(part.kind, part.key))
            await result.bytes_async()

        await asyncio.gather(*(get(part) for part, _ in self.parts))

    async def ranged_gets(self) -> None:
        async def get(part: Description) -> None:
            size = HEADER_BYTES + part.nbytes
            starts = range(0, size, PIECE_BYTES)
            ends = [min(size, start + PIECE_BYTES) for start in starts]
            name = name_of(part.kind, part.key)
            await obstore.get_ranges_async(
                self.store, name, starts=list(starts), ends=ends, coalesce=0
            )

        await asyncio.gather(*(get(part) for part, _ in self.parts))


async def measure(measured: Measured, rounds: int) -> None:
    multipart = {"use_multipart": True, "chunk_size": PIECE_BYTES}
    writes: dict[str, Way] = {
        "tier": measured.tier_writes,
        "obstore, one request an object": lambda: measured.puts(use_multipart=False),
        "obstore, multipart, one piece at a time": lambda: measured.puts(
            max_concurrency=1, **multipart
        ),
        "obstore, multipart, 12 pieces at a time": lambda: measured.puts(
            max_concurrency=12, **multipart
        ),
    }
    reads: dict[str, Way] = {
        "tier": measured.tier_reads,
        "obstore, whole objects": measured.whole_gets,
        "obstore, ranges": measured.ranged_gets,
    }
    nbytes = sum(part.nbytes for part, _ in measured.parts)
    for what, ways in (("write", writes), ("read", reads)):
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(rounds + 1):
            for way, function in ways.items():
                if what == "write":
                    measured.delete_all()
                begin = time.perf_counter()
                await function()
                if number:  # the first round fills caches and opens connections
                    seconds[way].append(time.perf_counter() - begin)
        medians = {way: statistics.median(each) for way, each in seconds.items()}
        for way, each in seconds.items():
            rates = sorted(nbytes / one / 1e9 for one in each)
            print(
                f"{what:6} {way:42} {nbytes / medians[way] / 1e9:6.2f} GB/s "
                f"({rates[0]:.2f} to {rates[-1]:.2f})"
            )
        ratio = min(medians[way] for way in ways if way != "tier") / medians["tier"]
        met = "met" if ratio >= GOAL else "missed"
        print(f"{what:6} tier / fastest of obstore alone: {ratio:.2f} (goal {GOAL}: {met})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--parts", type=int, default=8)
    parser.add_argument("--mib", type=int, default=32, help="of each part")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where the server's folder is made")
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(dir=given.folder) as folder,
        s3_server(Path(folder)) as server,
    ):
        os.environ.update(server.environment())
        measured = Measured(f"s3://{BUCKET}/bench", make_parts(given.parts, given.mib << 20))
        asyncio.run(measure(measured, given.rounds))


if __name__ == "__main__":
    main()
